# SPDX-License-Identifier: Apache-2.0
"""A Node that bears the name of a machine that joins: whose it is, and whether that one is gone."""

from __future__ import annotations

from k3sagentd.core import roster
from k3sagentd.core.cluster import KubeNode
from k3sagentd.core.hello import own_hello
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId


def is_left_behind(node: Node, kube: KubeNode, joiner: NodeId, now_s: float) -> bool:
    """Whether a Node keeps the joiner out, and nobody is behind it any more."""
    return is_in_the_way(kube, joiner) and still_there(node, kube, joiner, now_s) is None


def is_in_the_way(kube: KubeNode, joiner: NodeId) -> bool:
    """Whether K3s would refuse the joiner because of this Node (K3S.md 7).

    A machine's own Node is in nobody's way, unless it stands for a member that is no more.
    """
    return kube.node != joiner or kube.server


def still_there(node: Node, kube: KubeNode, joiner: NodeId, now_s: float) -> str | None:
    """Why the machine behind a Node is not surely gone; None when it is.

    Surely gone is: the joiner itself as it was before; the same hardware under another identity; or
    who was heard neither by K3s nor by us for as long as it takes to be replaced.
    """
    if holder := _holder(node, kube, joiner):
        return (
            f"another name: {kube.name} is the machine at {holder.address}; change the hostname of "
            "the one that joins, and k3sagentd reset there"
        )
    if kube.ready:
        return f"the Node {kube.name} to be given up by K3s, which still hears it"
    if kube.node == joiner:
        # With data it is a member that starts, or is stopped for a while; without, it was one.
        asks = node.peers.get(joiner)
        member = asks is not None and asks.hello.member
        return f"K3s on {kube.name} to be ready: it is a member of etcd" if member else None
    if _is_same_hardware(node, kube, joiner):
        return None
    known = {p.hello.node for p in node.peers.values() if p.hello.node_name == kube.name}
    owners = ({kube.node} if kube.node is not None else known) - {joiner}
    ages = [roster.absent_since_s(node, owner) for owner in owners if owner is not None]
    since_s = max([s for s in ages if s is not None], default=node.started_s)
    left_s = since_s + node.site.replace_after_s - now_s
    if left_s > 0:
        return f"the machine that was {kube.name} to be surely gone, in {left_s:.0f} s"
    return None


def _holder(node: Node, kube: KubeNode, joiner: NodeId) -> Hello | None:
    """Who is up and has this Node, other than the joiner: by its label, or, where that is nobody's
    who is here, by its name. A Node that was there before us, or before its machine's identity,
    does not say whose it is."""
    up = [hello for hello in (own_hello(node), *node.up) if hello.node != joiner]
    labelled = next((hello for hello in up if hello.node == kube.node), None)
    if labelled is not None or kube.node == joiner or _is_same_hardware(node, kube, joiner):
        return labelled
    return next((hello for hello in up if hello.node_name == kube.name), None)


def _is_same_hardware(node: Node, kube: KubeNode, joiner: NodeId) -> bool:
    asks = node.peers.get(joiner)
    mark = asks.hello.hardware if asks is not None else None
    return mark is not None and mark == kube.hardware
