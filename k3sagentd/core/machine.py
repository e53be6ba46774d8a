# SPDX-License-Identifier: Apache-2.0
"""The one door to the core: ``step(node, event) -> (node, effects)``, and ``deadline(node)``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, assert_never

from k3sagentd.core import (
    drive,
    election,
    guards,
    leaving,
    lifecycle,
    ranking,
    registration,
    roster,
    steward,
)
from k3sagentd.core.effects import Announce, Effect
from k3sagentd.core.events import (
    AddressChanged,
    ErrandEnded,
    Event,
    FactsRead,
    HelloReceived,
    InitForced,
    K3sProbed,
    LeaveAsked,
    MessageReceived,
    PeerLost,
    PeerRefused,
    PersistFailed,
    PersistRecovered,
    ResultRead,
    Tick,
)
from k3sagentd.core.hello import may_differ, own_hello
from k3sagentd.core.log import Abandon, Generation, Nominate, Seal, Value, is_nomination
from k3sagentd.core.messages import (
    Accept,
    Accepted,
    Cloned,
    Fetch,
    Hello,
    Intent,
    Learned,
    LeaveAnswer,
    LeaveRequest,
    Message,
    NotYet,
    Prepare,
    Promise,
    Registration,
    RegistrationRequest,
    Reject,
)
from k3sagentd.core.state import (
    PEERS_LIMIT,
    REFUSED_LIMIT,
    Accepting,
    Durable,
    Node,
    Peer,
    Preparing,
    Site,
)
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, NodePhase, short

FLIPS_OF_CLONES = 2
"""A restart changes the instance once, a late answer may change it back once; clones go on."""
AFTER_THE_SEAL = (NodePhase.JOINING, NodePhase.READY, NodePhase.FAILED)
FETCH_S = 2.0
"""Before a peer that knows more is asked again."""
CLONED = (
    "another live machine has this node's identity ({address}); run k3sagentd reset on one of them"
)


def new_node(site: Site, durable: Durable, now_s: float) -> Node:
    """A node as it is when its daemon starts."""
    return Node(site=site, durable=durable, started_s=now_s, phase_since_s=now_s, last_new_s=now_s)


def step(node: Node, event: Event) -> tuple[Node, tuple[Effect, ...]]:
    """Take in one event. Pure: the same node and event give the same result.

    The effects must be carried out in order (see ``effects``).
    """
    turn = Turn(node.but(now_s=event.now_s), event.now_s)
    _absorb(turn, event)
    lifecycle.advance(turn)
    before = turn.node
    _campaign(turn)
    if turn.node is not before:
        lifecycle.advance(turn)
    roster.watch(turn)
    drive.run(turn)
    steward.run(turn)
    leaving.run(turn)
    if may_differ(node, turn.node):
        _announce(turn)
    return turn.node, tuple(turn.effects)


def _absorb(turn: Turn, event: Event) -> None:
    match event:
        case Tick():
            pass
        case HelloReceived(hello=hello):
            _on_hello(turn, hello)
        case PeerLost(peer=peer):
            _on_lost(turn, peer)
        case PeerRefused(address=address, reason=reason):
            refused = {**turn.node.refused, address: reason}
            turn.set(refused=dict(list(refused.items())[-REFUSED_LIMIT:]))
        case MessageReceived(sender=sender, message=message):
            _on_message(turn, sender, message)
        case AddressChanged(address=address, also=also):
            turn.set(address=address, also=also)
        case FactsRead(facts=facts):
            turn.set(facts=facts)
        case ResultRead(result=result):
            drive.on_result(turn, result)
        case ErrandEnded(result=ended):
            steward.on_ended(turn, ended)
        case LeaveAsked(step=step):
            leaving.begin(turn, step)
        case K3sProbed(state=state):
            turn.set(k3s=state)
        case InitForced():
            _on_forced(turn)
        case PersistFailed(reason=reason):
            turn.set(storage_failure=reason)
        case PersistRecovered():
            turn.set(storage_failure=None)
        case _:
            assert_never(event)


# --- peers ----------------------------------------------------------------------------------


def _on_hello(turn: Turn, hello: Hello) -> None:
    node = turn.node
    if hello.node == node.id:
        if hello.instance != node.site.instance:
            _mute(turn, CLONED.format(address=hello.address or "address unknown"))
        return
    before = node.peers.get(hello.node)
    if before is None:
        if len(node.peers) >= PEERS_LIMIT:
            return
        peer = Peer(hello=hello, up=True, heard_s=turn.now_s)
    else:
        older = hello.instance == before.hello.instance and (hello.revision < before.hello.revision)
        peer = replace(
            before,
            up=True,
            heard_s=_heard_s(before, turn.now_s),
            hello=before.hello if older else hello,
        )
        if hello.instance != before.hello.instance:
            back = hello.instance == before.earlier_instance
            flips = before.flips + 1 if back else 0
            peer = replace(peer, earlier_instance=before.hello.instance, flips=flips)
            if flips >= FLIPS_OF_CLONES:
                turn.send(hello.node, Cloned(address=before.hello.address))
    if hello.generation == node.generation:
        roster.learn(turn, hello.roster)
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


def _heard_s(peer: Peer, now_s: float) -> float:
    """Who may not vote cannot seal either: hearing it does not keep its epoch alive."""
    return now_s if peer.hello.may_vote else peer.heard_s


def _on_lost(turn: Turn, peer_id: NodeId) -> None:
    peer = turn.node.peers.get(peer_id)
    if peer is None or not peer.up:
        return
    peer = replace(peer, up=False, heard_s=_heard_s(peer, turn.now_s), lost_s=turn.now_s)
    turn.set(peers={**turn.node.peers, peer_id: peer})
    turn.report(f"lost {turn.node.name_of(peer_id)} ({short(peer_id)}): {_here(turn.node)}")


def _here(node: Node) -> str:
    """How many machines are here; ``nodes`` is how many elect, and means nothing after that."""
    whole = f" of {node.nodes}" if node.seal is None else ""
    return f"{node.seen}{whole} machines here"


def _catch_up(turn: Turn) -> None:
    """Ask a peer that knows more entries for them."""
    node = turn.node
    for hello in node.up:
        peer = node.peers[hello.node]
        if has_news(node, hello) and turn.now_s >= peer.fetch_s + FETCH_S:
            turn.set(peers={**node.peers, hello.node: replace(peer, fetch_s=turn.now_s)})
            newer = hello.generation > node.generation
            first = 0 if newer else len(node.log)
            generation = hello.generation if newer else node.generation
            turn.send(hello.node, Fetch(first=first, generation=generation))
            return


def has_news(node: Node, hello: Hello) -> bool:
    """Whether a peer has entries that we would take: those of our count, or a sealed log."""
    if hello.generation != node.generation:
        newer = hello.generation > node.generation and hello.log_length > 0
        return newer and not guards.holds_data(node)
    if hello.log_length <= len(node.log):
        return False
    return hello.generation.number > 0 or hello.nodes == node.nodes or hello.phase in AFTER_THE_SEAL


def _mute(turn: Turn, reason: str) -> None:
    """Never vote again under this identity; what is durable says so too."""
    if turn.node.durable.muted is None:
        turn.persist(muted=reason)
        turn.set(proposal=None)
        turn.report(reason)


# --- messages -------------------------------------------------------------------------------


def _on_message(turn: Turn, sender: NodeId, message: Message) -> None:
    node = turn.node
    peer = node.peers.get(sender)
    if peer is not None and not peer.up:
        peer = replace(peer, heard_s=_heard_s(peer, turn.now_s), lost_s=turn.now_s)
        turn.set(peers={**node.peers, sender: peer})
    match message:
        case Prepare():
            turn.send(sender, election.answer_prepare(turn, sender, message))
        case Accept():
            turn.send(sender, election.answer_accept(turn, sender, message))
        case Promise():
            election.on_promise(turn, sender, message)
        case Accepted():
            election.on_accepted(turn, sender, message)
        case Reject():
            election.on_reject(turn, sender, message)
        case Learned():
            election.learn(turn, message)
        case Fetch(first=first, generation=generation):
            first = first if generation == node.generation else 0
            if first < len(node.log):
                turn.send(sender, election.chosen_from(node, first))
        case Cloned(address=address):
            _mute(turn, CLONED.format(address=address or "address unknown"))
        case RegistrationRequest():
            answer = steward.answer_joiner(turn, sender, message)
            if answer is not None:
                turn.send(sender, answer)
        case Registration():
            registration.on_registration(turn, message)
        case NotYet():
            registration.on_not_yet(turn, sender, message)
        case LeaveRequest():
            turn.send(sender, steward.answer_leaver(turn, sender, message))
        case LeaveAnswer():
            leaving.on_answer(turn, sender, message)
        case _:
            assert_never(message)


# --- ballots of our own ---------------------------------------------------------------------


def _campaign(turn: Turn) -> None:
    """Go on with our ballot, or open one when it is our turn."""
    _catch_up(turn)
    if turn.node.generation.number:
        _decide_alone(turn)
        return
    if turn.node.proposal is not None:
        election.advance(turn)
        return
    plan = _plan(turn.node, turn.now_s)
    if plan is not None and turn.now_s >= plan[0]:
        _, intent, wanted = plan
        election.propose(turn, intent, wanted)


def _decide_alone(turn: Turn) -> None:
    """The forced node enters the seal itself: the operator stands in for the quorum."""
    node = turn.node
    if node.seal is None and node.is_forced and (seal := drive.own_seal(node)):
        _enter(turn, seal)


def _enter(turn: Turn, value: Value) -> None:
    node = turn.node
    message = Learned(
        first=len(node.log), entries=(value,), nodes=node.nodes, generation=node.generation
    )
    election.learn(turn, message, announce=True)


def _plan(node: Node, now_s: float) -> tuple[float, Intent, Seal | Abandon | None] | None:
    """When this node would open a ballot, and what for; None while it has no cause to."""
    if node.generation.number or node.seal is not None or node.facts is None:
        return None
    if node.seen < node.quorum:
        return None
    earliest_s = node.propose_not_before_s
    if is_nomination(len(node.log)):
        if node.phase is not NodePhase.ELECTING or (turn_of := _position(node)) is None:
            return None
        at_s = node.phase_since_s + turn_of * election.STAGGER_S + election.pause_s(node)
        return max(at_s, earliest_s), Intent.NOMINATE, None
    if node.is_init:
        if reason := drive.init_failure(node, now_s):
            return earliest_s, Intent.ABANDON, Abandon(reason=reason)
        if seal := drive.own_seal(node):
            return earliest_s, Intent.SEAL, seal
        return None
    nomination = node.nomination
    if nomination is None:
        return None
    peer = node.peers.get(nomination.init)
    if peer is not None and peer.able:
        return None
    silent_since_s = peer.heard_s if peer else node.started_s
    at_s = silent_since_s + node.site.abandon_after_s
    at_s += (_position(node) or 0) * election.STAGGER_S
    reason = f"{node.name_of(nomination.init)} was not heard for {node.site.abandon_after_s:.0f} s"
    return max(at_s, earliest_s), Intent.ABANDON, Abandon(reason=reason)


def _position(node: Node) -> int | None:
    """Our place among those here who may propose, 0 being first."""
    order = [hello.node for hello in ranking.ranked(node, (own_hello(node), *node.up))]
    return order.index(node.id) if node.id in order else None


def _on_forced(turn: Turn) -> None:
    """The operator stands in for the quorum: a generation of the log that is this node's own.

    Who is to start the cluster already goes on with what it has started.
    """
    node = turn.node
    if guards.why_not_force(node) is not None or (node.is_forced and node.seal is None):
        return
    generation = Generation(number=node.generation.number + 1, by=node.id)
    durable = node.durable
    kept: dict[str, Any] = {}
    if drive.has_own_start(node):
        kept = {
            "started_epoch": durable.started_epoch,
            "started_generation": durable.started_generation,
        }
    turn.report("the operator decides instead of a quorum: this node starts the cluster")
    election.open_generation(turn, generation, **kept)
    _enter(turn, Nominate(init=node.id, servers=(node.id,)))


# --- outward --------------------------------------------------------------------------------


def _announce(turn: Turn) -> None:
    hello = own_hello(turn.node)
    if hello != turn.node.announced:
        turn.set(announced=hello)
        turn.effects.append(Announce(hello=hello))


def deadline(node: Node) -> float | None:
    """When the core next wants a Tick, in monotonic seconds; None: not before another event.

    What was due at the last step and did not happen waits for something else than time.
    """
    return min((at_s for at_s in _deadlines(node) if at_s > node.now_s), default=None)


def _deadlines(node: Node) -> Iterator[float]:
    proposal = node.proposal
    if isinstance(proposal, Preparing):
        if len(proposal.promises) >= node.quorum:
            yield election.patience_until_s(node, proposal)
        yield proposal.deadline_s
    elif isinstance(proposal, Accepting):
        yield proposal.deadline_s
    elif plan := _plan(node, -math.inf):
        yield plan[0]
    if node.phase is NodePhase.DISCOVERING and guards.may_not_propose(node) is None:
        yield node.last_new_s + node.site.settle_s
    if (due_s := drive.order_due_s(node.drive)) is not None:
        yield due_s
    if node.phase is NodePhase.JOINING:
        yield registration.due_s(node)
        yield node.drive.ordered_s + drive.KEPT_OUT_S
    yield from steward.deadlines(node)
    yield from leaving.deadlines(node)
    if node.phase is NodePhase.INITIALISING and node.drive.first_order_s is not None:
        yield node.drive.first_order_s + node.site.abandon_after_s
    for hello in node.up:
        if has_news(node, hello):
            yield node.peers[hello.node].fetch_s + FETCH_S
