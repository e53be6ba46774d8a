# SPDX-License-Identifier: Apache-2.0
"""Who is here: hellos that come, machines that are lost, two with one identity; and who knows more
of the bootstrap log than we do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from k3sagentd.core import guards, roster
from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.core.messages import Cloned, Fetch, Hello
from k3sagentd.core.state import PEERS_LIMIT, Node, Peer
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, short

FLIPS_OF_CLONES = 2
"""A restart changes the instance once, a late answer may change it back once; clones go on."""
FETCH_S = 2.0
"""Before a peer that knows more is asked again."""


def on_hello(turn: Turn, hello: Hello) -> None:
    """Take in what a peer tells of itself; our own id in it is a clone."""
    node = turn.node
    if hello.node == node.id:
        if hello.instance != node.site.instance:
            mute(turn, guards.CLONED.format(address=hello.address or "address unknown"))
        return
    before = node.peers.get(hello.node)
    if before is None:
        if len(node.peers) >= PEERS_LIMIT and not _make_room(turn):
            return
        node = turn.node
        peer = Peer(hello=hello, up=True, heard_s=turn.now_s)
    else:
        older = hello.instance == before.hello.instance and (hello.revision < before.hello.revision)
        peer = replace(
            before,
            up=True,
            heard_s=heard_s(before, turn.now_s),
            hello=before.hello if older else hello,
        )
        if hello.instance != before.hello.instance:
            back = hello.instance == before.earlier_instance
            flips = before.flips + 1 if back else 0
            peer = replace(peer, earlier_instance=before.hello.instance, flips=flips)
            if flips >= FLIPS_OF_CLONES:
                turn.send(hello.node, Cloned(address=before.hello.address))
    if peer.flips >= FLIPS_OF_CLONES and peer.hello.may_vote:
        # They stop when they hear of it; what one of them said before may arrive after that.
        peer = replace(peer, hello=replace(peer.hello, may_vote=False))
    if hello.server_url is not None or (hello.member and hello.datastore is Datastore.ETCD):
        peer = replace(peer, served=True)
    elif hello.k3s_role is ServerOrAgent.AGENT:
        peer = replace(peer, served=False)  # it was struck out, and its member with it
    news = before is None or not before.up
    refused = {a: r for a, r in node.refused.items() if a != hello.address}
    turn.set(
        peers={**node.peers, hello.node: peer},
        last_new_s=turn.now_s if news else node.last_new_s,
        refused=refused if len(refused) != len(node.refused) else node.refused,
    )
    if news:
        turn.report(
            f"sees {turn.node.name_of(hello.node)} ({short(hello.node)}) at {hello.address}: "
            f"{_here(turn.node)}"
        )


def _make_room(turn: Turn) -> bool:
    """Forget who was not heard for longest and is no server; False where all are here."""
    peers, servers = turn.node.peers, roster.members(turn.node)
    gone = [p for p in peers.values() if not p.up and p.hello.node not in servers]
    if not gone:
        return False
    oldest = min(gone, key=lambda peer: peer.lost_s).hello.node
    turn.set(peers={each: peer for each, peer in peers.items() if each != oldest})
    return True


def heard_s(peer: Peer, now_s: float) -> float:
    """Who may not vote cannot seal either: hearing it does not keep its epoch alive."""
    return now_s if peer.hello.may_vote else peer.heard_s


def on_lost(turn: Turn, peer_id: NodeId) -> None:
    """A peer does not answer any more."""
    peer = turn.node.peers.get(peer_id)
    if peer is None or not peer.up:
        return
    peer = replace(peer, up=False, heard_s=heard_s(peer, turn.now_s), lost_s=turn.now_s)
    turn.set(peers={**turn.node.peers, peer_id: peer})
    turn.report(f"lost {turn.node.name_of(peer_id)} ({short(peer_id)}): {_here(turn.node)}")


def _here(node: Node) -> str:
    """How many machines are here; ``nodes`` is how many elect, and means nothing after that."""
    whole = f" of {node.nodes}" if node.seal is None else ""
    return f"{node.seen}{whole} machines here"


def catch_up(turn: Turn) -> None:
    """Ask a peer that knows more entries for them."""
    node = turn.node
    for hello in node.ahead:
        peer = node.peers[hello.node]
        if has_news(node, hello) and turn.now_s >= peer.fetch_s + FETCH_S:
            turn.set(peers={**node.peers, hello.node: replace(peer, fetch_s=turn.now_s)})
            # A log that is sealed is read whole: it may be another than what was begun here.
            whole = hello.generation > node.generation or hello.phase in guards.AFTER_THE_SEAL
            first = 0 if whole else len(node.log)
            generation = max(hello.generation, node.generation)
            turn.send(hello.node, Fetch(first=first, generation=generation))
            return


def has_news(node: Node, hello: Hello) -> bool:
    """Whether a peer has entries that we would take: those of our count, or a sealed log."""
    if hello.generation != node.generation:
        newer = hello.generation > node.generation and hello.log_length > 0
        return newer and not guards.holds_data(node)
    if hello.log_length <= len(node.log) or node.seal is not None or node.split is not None:
        return False
    counted = hello.generation.number > 0 or hello.nodes == node.nodes
    return counted or hello.phase in guards.AFTER_THE_SEAL


def mute(turn: Turn, reason: str) -> None:
    """Never vote again under this identity; what is durable says so too."""
    if turn.node.durable.muted is None:
        turn.persist(muted=reason)
        turn.set(proposal=None)
        turn.report(reason)


def deadlines(node: Node) -> Iterator[float]:
    """When a peer that knows more may be asked again."""
    for hello in node.ahead:
        if has_news(node, hello):
            yield node.peers[hello.node].fetch_s + FETCH_S
