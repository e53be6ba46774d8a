# SPDX-License-Identifier: Apache-2.0
"""Which machines should be servers: learned from the cluster, and what it ought to be.

The roster changes by the word of the Lease's holder alone (``steward``); everybody else takes the
newest that a peer knows. Its number of servers is odd, but while one takes over from another that
is alive: two members of etcd are worse than one (K3S.md 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from k3sagentd.core import ranking
from k3sagentd.core.cluster import Roster
from k3sagentd.core.hello import has_etcd, k3s_role, own_hello, server_url
from k3sagentd.core.k3s import Action, Datastore, ServerOrAgent
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, NodePhase, Role

SERVER = ServerOrAgent.SERVER
ALIVE_S = 300.0
"""So long K3s's word that a silent machine is alive is good, or for ``replace-after``."""


def learn(turn: Turn, found: Roster | None) -> None:
    """Take a newer roster in; an older one, or one of another bootstrap log, means nothing."""
    node = turn.node
    if found is None or found.revision <= node.roster.revision or found.init != node.roster.init:
        return
    before = k3s_role(node)
    turn.persist(roster=found)
    turn.set(rostered_s=turn.now_s)
    if k3s_role(turn.node) is not before and node.phase is NodePhase.JOINING:
        order = node.drive.order
        order = None if order is not None and order.action is Action.PREPARE else order
        turn.drive(order=order, prepared=False, registration=None, asked_s=float("-inf"), told=None)
    names = ", ".join(node.name_of(each) for each in found.servers)
    turn.report(f"roster {found.revision}: the servers are {names}")


def watch(turn: Turn) -> None:
    """Note since when servers are missing."""
    node = turn.node
    ready = ready_servers(node)
    sealed = node.seal is not None
    unserved = _since(node.unserved_since_s, sealed and not ready, turn.now_s)
    short = _since(node.short_since_s, sealed and len(ready) < node.site.servers, turn.now_s)
    if (unserved, short) != (node.unserved_since_s, node.short_since_s):
        turn.set(unserved_since_s=unserved, short_since_s=short)


def _since(before_s: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if before_s is None else before_s


def ready_servers(node: Node) -> list[NodeId]:
    """The servers that are ready now, as we hear."""
    own = [node.id] if server_url(node) is not None else []
    return own + [hello.node for hello in node.kin if hello.server_url is not None]


def members(node: Node) -> tuple[NodeId, ...]:
    """Who is a server by the roster, or was one before there was a roster, or before us."""
    listed, unwritten = node.roster.servers, node.roster.revision == 0
    adopted = [
        h.node
        for h in node.kin
        if h.datastore is Datastore.ETCD
        and h.existing == _ca_hash(node)
        and h.member
        and (unwritten or h.adopted)
    ]
    if has_etcd(node) and k3s_role(node) is ServerOrAgent.SERVER:
        adopted.append(node.id)
    return (*listed, *sorted(set(adopted) - set(listed)))


def _ca_hash(node: Node) -> str | None:
    return node.seal.ca_hash if node.seal is not None else None


def absent_since_s(node: Node, machine: NodeId) -> float | None:
    """Since when ``machine`` is not heard; None while it is.

    Who was never heard is absent since our own start: a restart must not make us hasty.
    """
    if machine == node.id:
        return None
    peer = node.peers.get(machine)
    if peer is None:
        return node.started_s
    return None if peer.up else peer.lost_s


def is_gone(node: Node, machine: NodeId, now_s: float) -> bool:
    """Whether ``machine`` was not heard for so long that its place may be given away.

    Not by us, and not by K3s either, as far as we looked: its daemon alone may be what is silent.
    """
    due_s = _due_s(node, machine)
    overdue = due_s is not None and due_s <= now_s
    return overdue and not is_heard_by_k3s(node, machine, now_s)


def is_heard_by_k3s(node: Node, machine: NodeId, now_s: float) -> bool:
    """Whether K3s was seen to hear a machine that is silent to us, when we looked for its sake."""
    due_s, view = _due_s(node, machine), node.steward.view
    if due_s is None or view is None or not _has_looked(node, due_s, now_s):
        return False
    name = node.name_of(machine)
    return any(
        kube.ready and (kube.node == machine or (kube.node is None and kube.name == name))
        for kube in view.nodes
    )


def must_look(node: Node, now_s: float) -> bool:
    """Whether a steward must look at the cluster before it takes a silent machine to be gone."""
    dues = [_due_s(node, machine) for machine in members(node)]
    return any(
        due is not None and due <= now_s and not _has_looked(node, due, now_s) for due in dues
    )


def _due_s(node: Node, machine: NodeId) -> float | None:
    since_s = absent_since_s(node, machine)
    return None if since_s is None else since_s + node.site.replace_after_s


def look_again_s(node: Node) -> float:
    """Until when the last look tells whether a silent machine is alive."""
    return node.steward.viewed_s + min(ALIVE_S, node.site.replace_after_s)


def _has_looked(node: Node, due_s: float, now_s: float) -> bool:
    return due_s <= node.steward.viewed_s and now_s < look_again_s(node)


def is_overdue(node: Node, now_s: float) -> bool:
    """Whether servers are missing for so long that other machines may step in.

    Who was listed last has as long to become one.
    """
    if node.short_since_s is None:
        return False
    return now_s >= max(node.short_since_s, node.rostered_s) + node.site.replace_after_s


def may_serve(hello: Hello) -> bool:
    """Whether a machine that is no server could be made one."""
    able = hello.role is not Role.AGENT and hello.k3s_role is ServerOrAgent.AGENT
    settled = hello.phase in (NodePhase.JOINING, NodePhase.READY)
    able = able and settled and hello.sound and not hello.adopted
    return able and hello.datastore in (Datastore.NONE, Datastore.AGENT)


def desired(node: Node, now_s: float, joiner: NodeId | None = None) -> tuple[NodeId, ...] | None:
    """The servers as they should be listed next; None where the list is right, or must wait.

    One step at a time: a server that is alive goes only after who takes its place is ready, one
    that is dead goes with the word that names another. ``joiner`` asks to join just now, which may
    be here before its hello says so.
    """
    heard = {h.node: h for h in (own_hello(node), *node.kin)}
    if joiner is not None and joiner in heard:
        heard[joiner] = replace(
            heard[joiner], phase=NodePhase.JOINING, k3s_role=ServerOrAgent.AGENT
        )
    listed = members(node)
    for each in listed:
        # Its daemon alone is silent: a server like any other, that cannot answer for itself.
        if (
            each not in heard
            and (peer := node.peers.get(each))
            and is_heard_by_k3s(node, each, now_s)
        ):
            heard[each] = replace(peer.hello, server_url=peer.hello.server_url or "known to K3s")
    current = (*listed, *_unlisted(node, heard, listed))
    absent = [each for each in current if each not in heard]
    dead = [each for each in absent if is_gone(node, each, now_s)]
    if len(dead) < len(absent):
        return None  # perhaps it only boots
    here = [heard[each] for each in current if each in heard]
    best = _best(node, here, [h for h in heard.values() if h.node not in current], now_s)
    waits = any(h.server_url is None for h in here if h.node in listed)
    found = _next(node, current, here, best, now_s, dead=bool(dead), waits=waits)
    return None if found is None or set(found) == set(listed) else found


def _unlisted(
    node: Node, heard: Mapping[NodeId, Hello], listed: tuple[NodeId, ...]
) -> list[NodeId]:
    """Servers that run and count in etcd, though the roster was changed before they were ready."""
    view = node.steward.view
    nodes = view.nodes if view is not None else ()
    found = (kube.node for kube in nodes if kube.server and kube.ready)
    return [each for each in found if each is not None and each in heard and each not in listed]


def _next(
    node: Node,
    current: tuple[NodeId, ...],
    here: list[Hello],
    best: tuple[NodeId, ...],
    now_s: float,
    *,
    dead: bool,
    waits: bool,
) -> tuple[NodeId, ...] | None:
    healthy = all(hello.server_url for hello in here if hello.member and hello.k3s_role is SERVER)
    kept = tuple(h.node for h in here if h.member or h.node in best)
    added = tuple(each for each in best if each not in current)
    if added:
        # From one server to another there is no safe way: of two, neither may stop.
        alone = len(kept) + len(added) == 2
        return (*kept, *added) if (dead or healthy) and not alone else None
    others = (h for h in here if h.node in kept and h.node not in best and not h.adopted)
    surplus = sorted(others, key=lambda h: h.role is Role.AGENT)
    if dead or len(kept) < len(here):
        fewer = kept if _may_shrink(node, len(kept), now_s) else current
        if surplus and not waits and len(fewer) % 2 == 0 and len(fewer) > node.site.servers:
            fewer = tuple(each for each in fewer if each != surplus[-1].node)
        elif dead and len(fewer) % 2 == 0:
            # Who has not come in yet waits for the dead one to be prepared: it is asked again.
            outside = [h.node for h in here if h.node in fewer and not h.member]
            fewer = tuple(each for each in fewer if each not in outside[-1:])
        return fewer if fewer != current and len(fewer) % 2 else None
    taken_over = node.roster.revision > 0 and len(current) % 2 == 0
    if surplus and taken_over:
        left = tuple(each for each in current if each != surplus[-1].node)
        return None if waits else left
    return current if len(current) % 2 else None


def _may_shrink(node: Node, left: int, now_s: float) -> bool:
    """Whether somebody may be struck out for whom nobody steps in.

    Where enough servers are left, that is who was to take over from another of them, and cannot.
    """
    settled = now_s >= node.rostered_s + node.site.replace_after_s
    return is_overdue(node, now_s) or (settled and left >= node.site.servers)


def _best(node: Node, here: list[Hello], others: list[Hello], now_s: float) -> tuple[NodeId, ...]:
    """Those who should be servers, best first: who was one before us and is not ours to demote, who
    was asked to, who is one, the faster disk, who runs nothing yet."""
    stepping_down = any(h.role is Role.AGENT and not h.adopted for h in here)
    vacant = stepping_down or is_overdue(node, now_s)
    able = [h for h in here if (h.adopted or h.role is not Role.AGENT) and (h.member or h.sound)]
    able += [h for h in others if may_serve(h) and (vacant or h.role is Role.SERVER)]
    asked_for = sum(hello.role is Role.SERVER for hello in able)
    size = ranking.odd(min(max(node.site.servers, asked_for), len(able)))

    def key(hello: Hello) -> tuple[bool, bool, bool, bool, int, bool, bytes]:
        return (
            not (hello.adopted and hello.member),
            hello.role is not Role.SERVER,
            not hello.member,
            hello.k3s_role is not SERVER,
            hello.fitness,
            hello.phase is NodePhase.READY,
            ranking.lot(node.site.election_key, hello.node),
        )

    return tuple(hello.node for hello in sorted(able, key=key)[:size])
