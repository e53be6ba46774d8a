# SPDX-License-Identifier: Apache-2.0
"""K3s's name for this node: chosen once, the same for the life of the machine."""

from __future__ import annotations

from k3sagentd.core import guards
from k3sagentd.core.k3s import Action, Datastore
from k3sagentd.core.state import Node
from k3sagentd.core.turn import Turn

COMMON_HOSTNAMES = frozenset({"raspberrypi", "localhost", "debian", "ubuntu", "dietpi", "armbian"})
"""Names that images come with: never used alone as K3s's node name."""


def keep(turn: Turn) -> str:
    """The name, made durable before anything is called by it.

    Until K3s was started by it, it is chosen anew: a machine with the same hostname may be heard
    later than the first server, and a hostname be changed.
    """
    name = turn.node.durable.node_name
    if name is None or _is_unused(turn.node):
        chosen = choose(turn.node)
        if chosen != name:
            turn.persist(node_name=chosen)
        return chosen
    return name


def _is_unused(node: Node) -> bool:
    order, facts = node.drive.order, node.facts
    started = order is not None and order.action is not Action.PREPARE
    blank = facts is not None and facts.datastore is Datastore.NONE
    # A clone keeps the name as well: that of its twin, under which K3s refuses it.
    durable = node.durable
    return blank and not started and durable.started_epoch is None and durable.muted is None


def choose(node: Node) -> str:
    """The hostname, made unique where others have or may have it; K3s's own where it ran before:
    under another it would be a new Node, and leave the old one behind."""
    hostname = node.site.hostname
    if node.facts is not None and (before := node.facts.node_name or node.facts.told_name):
        return before
    if guards.existing_cluster(node) is not None:
        return hostname
    taken = {
        name for peer in node.peers.values() for name in (peer.hello.hostname, peer.hello.node_name)
    }
    if hostname in taken or hostname in COMMON_HOSTNAMES:
        return f"{hostname[:54].rstrip('-')}-{node.id[:8]}"
    return hostname
