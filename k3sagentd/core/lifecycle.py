# SPDX-License-Identifier: Apache-2.0
"""The life of a node as one table: in which phase, on what condition, what comes next, and why.

``advance`` applies the first rule that holds until none does. A node changes its phase here and
nowhere else; what a phase orders of K3s is in ``drive``, what it votes in ``election``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from k3sagentd.core import drive, guards, standing
from k3sagentd.core.hello import k3s_role
from k3sagentd.core.k3s import Action, K3sState, Outcome, ServerOrAgent
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodePhase

P = NodePhase
RULES_PER_EVENT_LIMIT = 12
"""More changes of phase than this in one step is a circle in the table, that is: a bug."""


# --- conditions -----------------------------------------------------------------------------


def in_conflict(turn: Turn) -> bool:
    """Two clusters, or two logs, under one token."""
    return guards.conflict(turn.node) is not None


def conflict_is_over(turn: Turn) -> bool:
    """Only one cluster is left to see."""
    return not in_conflict(turn)


def abandoned_here(turn: Turn) -> bool:
    """The epoch in which this node was to start the cluster was abandoned."""
    return standing.must_stand_down(turn.node)


def has_stood_down(turn: Turn) -> bool:
    """K3s is stopped and its data moved aside."""
    order = turn.node.drive.order
    done = turn.node.drive.outcome is Outcome.DONE
    return order is not None and order.action is Action.STAND_DOWN and done


def is_sealed(turn: Turn) -> bool:
    """The cluster exists."""
    return turn.node.seal is not None


def is_nominated_here(turn: Turn) -> bool:
    """This node may start the cluster."""
    return turn.node.seal is None and turn.node.is_init


def is_nominated_elsewhere(turn: Turn) -> bool:
    """Another node may start the cluster."""
    return turn.node.nomination is not None and not turn.node.is_init


def nobody_is_nominated(turn: Turn) -> bool:
    """No epoch is under way: it was abandoned, or none has begun."""
    return turn.node.nomination is None


def may_elect(turn: Turn) -> bool:
    """A quorum is here, and whoever else may be had the time to be heard."""
    node = turn.node
    return guards.may_not_propose(node) is None and turn.now_s >= guards.settled_s(node)


def may_not_elect(turn: Turn) -> bool:
    """Too few machines, too many, or machines that disagree."""
    return guards.may_not_propose(turn.node) is not None


def k3s_is_ready(turn: Turn) -> bool:
    """The probe finds this machine's K3s ready, and it is of the sealed cluster."""
    state, seal = turn.node.k3s, turn.node.seal
    if standing.is_other_role(turn.node):
        return False  # it is ready as what it should not be any more
    if not state.ready or seal is None:
        return False
    is_agent = k3s_role(turn.node) is ServerOrAgent.AGENT
    return state.ca_hash == seal.ca_hash or (is_agent and state.ca_hash is None)


def k3s_is_not_ready(turn: Turn) -> bool:
    """K3s stopped answering; its own unit restarts it."""
    return not turn.node.k3s.ready


def has_begun_anew(turn: Turn) -> bool:
    """A forced start opened another log, which this node follows."""
    return turn.node.seal is None


def is_superseded(turn: Turn) -> bool:
    """The operator forced a new cluster, and K3s here has data of the one before."""
    return guards.superseded(turn.node) is not None


def is_other_role(turn: Turn) -> bool:
    """The roster changed: K3s here is to be a server and was none, or the other way round."""
    return standing.is_other_role(turn.node)


def cannot_join(turn: Turn) -> bool:
    """A person is needed: a flag differs, or the install failed for good."""
    node = turn.node
    return standing.flag_mismatch(node) is not None or node.drive.outcome is Outcome.FAILED_FOR_GOOD


def may_try_again(turn: Turn) -> bool:
    """What stood in the way is gone, or it is time to look whether it is."""
    node = turn.node
    due = node.drive.retry_at_s is None or turn.now_s >= node.drive.retry_at_s
    return standing.flag_mismatch(node) is None and due


# --- actions --------------------------------------------------------------------------------


def nothing(turn: Turn) -> None:
    """The change of phase is all."""


def begin_anew(turn: Turn) -> None:
    """Leave an epoch that is over."""
    drive.reset(turn)
    turn.set(last_new_s=turn.now_s, k3s=K3sState())


def change_over(turn: Turn) -> None:
    """What K3s was last told stays known: it says as what K3s runs now."""
    turn.drive(prepared=False, registration=None, asked_s=float("-inf"), told=None)


def forget_the_epoch(turn: Turn) -> None:
    """The data is aside: from here on this node is like any other."""
    turn.persist(started_epoch=None, started_generation=0)
    begin_anew(turn)


def try_again(turn: Turn) -> None:
    """The order that failed is due; ``drive`` gives it again, as a new attempt."""
    turn.drive(outcome=Outcome.FAILED)


# --- the table ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row: in one of ``phases``, when ``when`` holds, do ``then`` and be in ``next``."""

    phases: frozenset[NodePhase]
    when: Callable[[Turn], bool]
    next: NodePhase
    then: Callable[[Turn], None] = nothing
    why: str


def _rule(
    phases: tuple[NodePhase, ...],
    when: Callable[[Turn], bool],
    next_phase: NodePhase,
    why: str,
    then: Callable[[Turn], None] = nothing,
) -> Rule:
    return Rule(phases=frozenset(phases), when=when, next=next_phase, then=then, why=why)


BEFORE_THE_SEAL = (P.DISCOVERING, P.ELECTING, P.WAITING, P.INITIALISING)

TABLE: tuple[Rule, ...] = (
    _rule(
        BEFORE_THE_SEAL,
        abandoned_here,
        P.STANDING_DOWN,
        "no one ever joined this cluster; it must be gone before the node joins another",
        begin_anew,
    ),
    _rule(
        (P.STANDING_DOWN,),
        has_stood_down,
        P.DISCOVERING,
        "the data is aside, nothing is left that could be taken for a cluster",
        forget_the_epoch,
    ),
    _rule(
        (*BEFORE_THE_SEAL, P.JOINING),
        in_conflict,
        P.CONFLICT,
        "which of two clusters is meant is not ours to guess",
    ),
    _rule((P.CONFLICT,), conflict_is_over, P.DISCOVERING, "one cluster is left", begin_anew),
    _rule(
        (P.DISCOVERING, P.WAITING, P.INITIALISING),
        is_sealed,
        P.JOINING,
        "the cluster exists; whoever is not in it yet joins it",
    ),
    _rule(
        (P.DISCOVERING, P.ELECTING, P.WAITING),
        is_nominated_here,
        P.INITIALISING,
        "a quorum chose this node to start the cluster",
        begin_anew,
    ),
    _rule(
        (P.DISCOVERING, P.ELECTING, P.INITIALISING),
        is_nominated_elsewhere,
        P.WAITING,
        "no other node touches K3s before the seal",
        begin_anew,
    ),
    _rule(
        (P.WAITING, P.INITIALISING),
        nobody_is_nominated,
        P.DISCOVERING,
        "the epoch was abandoned before this node started anything",
        begin_anew,
    ),
    _rule(
        (P.DISCOVERING,),
        may_elect,
        P.ELECTING,
        "a quorum is here and agrees on what the site is",
    ),
    _rule(
        (P.ELECTING,),
        may_not_elect,
        P.DISCOVERING,
        "without a quorum that agrees, waiting is all that is allowed",
    ),
    _rule(
        (P.JOINING, P.READY, P.FAILED),
        has_begun_anew,
        P.DISCOVERING,
        "an operator forced another start; nothing of the one before is held here",
        begin_anew,
    ),
    _rule(
        (P.READY, P.FAILED),
        is_superseded,
        P.CONFLICT,
        "one of the two clusters is to be given up, and a person must say on each machine",
    ),
    _rule(
        (P.READY,),
        is_other_role,
        P.JOINING,
        "who is a server changed: this machine changes over",
        change_over,
    ),
    _rule((P.JOINING, P.FAILED), k3s_is_ready, P.READY, "K3s runs as a part of the cluster"),
    _rule((P.READY,), k3s_is_not_ready, P.JOINING, "what is not ready is not handed out"),
    _rule((P.JOINING,), cannot_join, P.FAILED, "a person must look"),
    _rule((P.FAILED,), may_try_again, P.JOINING, "perhaps a person has looked", try_again),
)


def advance(turn: Turn) -> None:
    """Apply the table until no rule holds."""
    for _ in range(RULES_PER_EVENT_LIMIT):
        rule = next((r for r in TABLE if turn.node.phase in r.phases and r.when(turn)), None)
        if rule is None:
            return
        before = turn.node.phase
        turn.set(phase=rule.next, phase_since_s=turn.now_s)
        rule.then(turn)
        turn.report(f"{before} -> {rule.next}: {rule.why}")
    raise AssertionError(f"the table goes in circles at {turn.node.phase}")
