# SPDX-License-Identifier: Apache-2.0
"""Where to join: what a node of a sealed site hands out, and what a joiner takes (design, 4.5)."""

from __future__ import annotations

import hashlib

from k3sagentd.core import names
from k3sagentd.core.hello import fixed_urls, k3s_role, server_url
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.messages import NotYet, Registration, RegistrationRequest
from k3sagentd.core.state import Node
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, NodePhase

ASK_S = 3.0
"""Before a peer is asked for the registration again, or the next one."""
ASK_LIMIT_S = 48.0
"""What the pause grows to where something must be seen to first, which may take a person."""
SERVERS_LIMIT = 16
"""Registration addresses in one answer or order."""


def spread(joiner: NodeId, choices: list[NodeId]) -> list[NodeId]:
    """Rendezvous hashing (Thaler and Ravishankar 1998): each joiner has its own order, and the
    joiners of one that went away are shared out among all others."""

    def weight(choice: str) -> bytes:
        return hashlib.sha256(f"{joiner}:{choice}".encode()).digest()

    return sorted(choices, key=weight, reverse=True)


def ready_urls(node: Node) -> tuple[str, ...]:
    """The ready servers that we hear, best first for this node."""
    ready = {h.node: h.server_url for h in node.kin if h.server_url}
    return tuple(ready[each] for each in spread(node.id, list(ready)))


def registration(node: Node, joiner: NodeId, role: ServerOrAgent) -> Registration | None:
    """What a node of a sealed site hands to one that joins; None before the seal."""
    seal, view = node.seal, node.steward.view
    if seal is None:
        return None
    ready = {h.node: h.server_url for h in node.kin if h.server_url and h.node != joiner}
    own = server_url(node)
    if own and joiner != node.id:
        ready[node.id] = own
    urls = [ready[each] for each in spread(joiner, list(ready))] or seal.addresses
    return Registration(
        servers=tuple(dict.fromkeys((*fixed_urls(node), *urls)))[:SERVERS_LIMIT],
        ca_hash=seal.ca_hash,
        k3s_version=view.release if view is not None else None,
        shared_flags=seal.shared_flags,
        role=role,
    )


# --- the joiner -----------------------------------------------------------------------------


def due_s(node: Node) -> float:
    """When a peer is asked next."""
    pause_s = ASK_S * 2.0 ** min(node.drive.asks // 5, 6)
    return node.drive.asked_s + min(ASK_LIMIT_S, pause_s)


def ask(turn: Turn) -> None:
    """Ask one sealed peer where to join; the next one when it does not answer in time.

    A ready server where one is heard: it alone knows whether our name is free.
    """
    node = turn.node
    if turn.now_s < due_s(node):
        return
    sealed = [h for h in node.kin if h.log_length >= len(node.log)]
    choices = [h.node for h in sealed if h.server_url] or [h.node for h in sealed]
    if not choices:
        return
    order = spread(node.id, choices)
    asked = node.drive.asked
    # Who said that it is being seen to is asked again; who said nothing is passed over.
    after = order.index(asked) + (not node.drive.answered) if asked in order else 0
    peer = order[after % len(order)]
    name = names.keep(turn)
    turn.drive(asked_s=turn.now_s, asked=peer, asks=node.drive.asks + 1, answered=False)
    role = k3s_role(node) or ServerOrAgent.AGENT
    turn.send(peer, RegistrationRequest(role=role, node_name=name))


def on_registration(turn: Turn, message: Registration) -> None:
    """Take a registration that is of the cluster we know to be sealed, for the role we have."""
    node = turn.node
    if node.phase is not NodePhase.JOINING or node.seal is None:
        return
    wanted = message.ca_hash == node.seal.ca_hash and message.role is k3s_role(node)
    if wanted and message.servers:
        # Who has one and asks again is kept out by something that may last.
        asks = 0 if node.drive.registration is None else node.drive.asks
        turn.drive(registration=message, answered=True, told=None, asks=asks)


def on_not_yet(turn: Turn, sender: NodeId, message: NotYet) -> None:
    """The server that we asked sees to something first."""
    node = turn.node
    if node.phase is NodePhase.JOINING and node.drive.asked == sender:
        asks = 0 if message.soon else node.drive.asks
        told = f"{node.name_of(sender)}: {message.reason}"[:200]
        turn.drive(answered=True, told=told, asks=asks)
