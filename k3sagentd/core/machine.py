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
    peers,
    ranking,
    registration,
    roster,
    standing,
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
    REFUSED_LIMIT,
    Accepting,
    Durable,
    Node,
    Preparing,
    Site,
)
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, NodePhase


def new_node(site: Site, durable: Durable, now_s: float) -> Node:
    """A node as it is when its daemon starts."""
    return Node(site=site, durable=durable, started_s=now_s, phase_since_s=now_s, last_new_s=now_s)


def step(node: Node, event: Event) -> tuple[Node, tuple[Effect, ...]]:
    """Take in one event. Pure: the same node and event give the same result.

    The effects must be carried out in order (see ``effects``).
    """
    turn = Turn(node.but(now_s=event.now_s), event.now_s)
    _absorb(turn, event)
    # A peer may have told it before we knew the log that it belongs to.
    roster.learn(turn, turn.node.told_roster)
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
            peers.on_hello(turn, hello)
        case PeerLost(peer=peer):
            peers.on_lost(turn, peer)
        case PeerRefused(address=address, reason=reason):
            refused = {**turn.node.refused, address: reason}
            turn.set(refused=dict(list(refused.items())[-REFUSED_LIMIT:]))
        case MessageReceived(sender=sender, message=message):
            _on_message(turn, sender, message)
        case AddressChanged():
            _on_address(turn, event)
        case FactsRead(facts=facts):
            drive.on_seen(turn, facts=facts)
        case ResultRead(result=result):
            drive.on_result(turn, result)
        case ErrandEnded(result=ended):
            steward.on_ended(turn, ended)
        case LeaveAsked(step=step):
            leaving.begin(turn, step)
        case K3sProbed(state=state):
            drive.on_seen(turn, k3s=state)
        case InitForced():
            _on_forced(turn)
        case PersistFailed(reason=reason):
            turn.set(storage_failure=reason)
        case PersistRecovered():
            turn.set(storage_failure=None)
        case _:
            assert_never(event)


def _on_address(turn: Turn, event: AddressChanged) -> None:
    """Another address, another network perhaps: who is there is not known yet."""
    if event.address is None or not event.carrier:
        turn.set(attached_s=math.inf)
    elif event.address != turn.node.address or turn.node.attached_s == math.inf:
        turn.set(attached_s=turn.now_s)
    turn.set(address=event.address, also=event.also)


# --- messages -------------------------------------------------------------------------------


def _on_message(turn: Turn, sender: NodeId, message: Message) -> None:
    node = turn.node
    peer = node.peers.get(sender)
    if peer is not None and not peer.up:
        peer = replace(peer, heard_s=peers.heard_s(peer, turn.now_s), lost_s=turn.now_s)
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
            peers.mute(turn, guards.CLONED.format(address=address or "address unknown"))
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
    peers.catch_up(turn)
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
    if node.seal is None and node.is_forced and (seal := standing.own_seal(node)):
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
        if reason := standing.init_failure(node, now_s):
            return earliest_s, Intent.ABANDON, Abandon(reason=reason)
        if seal := standing.own_seal(node):
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
    if guards.why_not_force(node) is not None or guards.is_forced_already(node):
        return
    generation = Generation(number=node.generation.number + 1, by=node.id)
    kept: dict[str, Any] = {}
    if standing.is_own_start(node):
        kept = {
            "started_epoch": standing.started_epoch(node),
            "started_generation": standing.started_generation(node),
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
        yield guards.settled_s(node)
    if (due_s := drive.order_due_s(node.drive)) is not None:
        yield due_s
    if node.phase is NodePhase.JOINING:
        yield registration.due_s(node)
        yield node.drive.ordered_s + drive.KEPT_OUT_S
        yield drive.down_due_s(node)
        yield standing.barrier_until_s(node)
    yield from steward.deadlines(node)
    yield from leaving.deadlines(node)
    if node.phase is NodePhase.INITIALISING and node.drive.first_order_s is not None:
        yield node.drive.first_order_s + node.site.abandon_after_s
    yield from peers.deadlines(node)
