# SPDX-License-Identifier: Apache-2.0
"""Whether the cluster can do without a server: which of the others are sure to stay, and live."""

from __future__ import annotations

from collections.abc import Iterable

from k3sagentd.core import paxos, roster
from k3sagentd.core.cluster import KubeNode
from k3sagentd.core.messages import LeaveStep
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId

FADING_S = 60.0
"""After this K3s surely has missed a Node whose machine stopped: somewhat longer than it takes
(kube-controller-manager, ``--node-monitor-grace-period``, 40 s)."""


def refusal(node: Node, kube: KubeNode, step: LeaveStep) -> str | None:
    """Why ``kube`` may not leave: the servers that stay must be a quorum of etcd's members.

    Who stops is a member until its Node is removed, so until then it counts.
    """
    view = node.steward.view
    if not kube.server or view is None:
        return None
    servers = [each for each in view.nodes if each.server]
    stay = [each for each in servers if each.name != kube.name]
    ready = sum(each.ready and _doubt(node, each) is None for each in stay)
    members = len(servers) - (step is LeaveStep.REMOVE)
    if len(servers) == 1:
        return f"{kube.name} is the only server: the cluster would end with it"
    if ready < (needed := paxos.quorum(members)):
        return (
            f"{ready} of the {len(stay)} servers that stay are ready{_doubtful(node, stay)}, "
            f"{needed} must be: without a quorum the cluster takes no changes; wait for them, or "
            "add a server"
        )
    return None


def owner_of(node: Node, kube: KubeNode) -> NodeId | None:
    """Whose Node this is; None: unknown. One that was there before us has no label of ours."""
    if kube.node is not None:
        return kube.node
    adopted = (peer.hello for peer in node.peers.values() if peer.hello.adopted)
    return next((hello.node for hello in adopted if hello.node_name == kube.name), None)


def _doubt(node: Node, kube: KubeNode) -> str | None:
    """Why a server that K3s calls ready may be none any more, or not for long.

    K3s calls it so for a while after it stopped; its daemon knows at once. Of a machine whose
    daemon has been silent for longer than that, K3s's word is good again.
    """
    if kube.cordoned:
        return "cordoned"  # it may be about to leave as well
    owner = owner_of(node, kube)
    if owner is None or owner == node.id:
        return None
    silent_since_s = roster.absent_since_s(node, owner)
    if silent_since_s is None:
        serves = any(hello.node == owner and hello.server_url for hello in node.kin)
        return None if serves else "K3s is not ready there"
    return "not heard just now" if node.steward.viewed_s < silent_since_s + FADING_S else None


def _doubtful(node: Node, nodes: Iterable[KubeNode]) -> str:
    doubts = ((each.name, _doubt(node, each)) for each in nodes if each.ready)
    said = ", ".join(f"{name}: {doubt}" for name, doubt in doubts if doubt)
    return f" (not counting {said})" if said else ""
