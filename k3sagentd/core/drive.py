# SPDX-License-Identifier: Apache-2.0
"""What this machine's K3s is ordered to be, and when: init, prepare, join, stand down.

The order of things is the promise: nothing before ``nominate`` is chosen, nothing on other nodes
before ``seal`` is, servers one after the other (design, 4.3 and 4.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from k3sagentd.core import guards, leaving, log, names, ranking
from k3sagentd.core.effects import WriteOrder
from k3sagentd.core.hello import fixed_urls, has_etcd, is_adopted, k3s_role, own_url
from k3sagentd.core.k3s import (
    Action,
    Datastore,
    Facts,
    K3sState,
    Order,
    Outcome,
    Result,
    ServerOrAgent,
)
from k3sagentd.core.messages import LeaveStep
from k3sagentd.core.registration import SERVERS_LIMIT, ask, ready_urls
from k3sagentd.core.standing import (
    has_own_start,
    is_member,
    is_other_role,
    join_barrier,
    started_epoch,
    started_generation,
)
from k3sagentd.core.state import Drive, Node
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodePhase

RETRY_S = 5.0
RETRY_LIMIT_S = 300.0
"""Between attempts: 5 s as K3s's own unit (RestartSec), doubled up to five minutes."""
FOR_GOOD_RETRY_S = 300.0
"""What needs a person is looked at again now and then, so that nobody has to tell us."""
KEPT_OUT_S = 60.0
"""K3s that was started to join and is not ready by then asks about its name again."""
DOWN_S = 300.0
"""A member whose K3s does not run for so long is seen to by root again."""
ORDER_TIMEOUT_S = 3600.0
"""After this an order without an end was lost with the process that had taken it: twice what an
install may take."""


def run(turn: Turn) -> None:
    """Give the order that the phase calls for, if it was not given yet or is due again."""
    node = turn.node
    if node.facts is None or node.address is None:
        return
    match node.phase:
        case NodePhase.INITIALISING if may_initialise(node):
            _ensure(turn, Action.INIT)
        case NodePhase.STANDING_DOWN:
            _ensure(turn, Action.STAND_DOWN)
        case NodePhase.JOINING:
            _join(turn)
        case NodePhase.READY:
            _settle_in(turn)


def may_initialise(node: Node) -> bool:
    """Whether the init node may (again) be started: with a quorum that knows nothing newer.

    To seal it needs the quorum anyway; and whoever was away may have been abandoned meanwhile. Of
    clones, which both read their name there, neither may: one may have begun.
    """
    if not node.is_init or guards.is_cloned(node) or guards.cluster_elsewhere(node) is not None:
        return False
    if node.is_forced:
        return True
    newer = any(
        hello.generation > node.generation or hello.log_length > len(node.log) for hello in node.up
    )
    return node.seen >= node.quorum and not newer


def _join(turn: Turn) -> None:
    node = turn.node
    if _is_stepping_down(node, turn.now_s):
        return  # whatever the roster says by now: root is putting the data aside
    if is_member(node):
        founds = node.is_init and k3s_role(node) is ServerOrAgent.SERVER
        action = Action.INIT if founds and not ready_urls(node) else Action.JOIN
        _ensure(turn, action, again=_is_down(node, turn.now_s))
        ours = k3s_role(node) is ServerOrAgent.AGENT and not is_adopted(node)
        if ours and is_kept_out(turn.node, turn.now_s):
            ask(turn)  # it was away for long, and another machine has its name
        return
    if is_other_role(node) and k3s_role(node) is ServerOrAgent.AGENT:
        # By the word of the others: three that are left of four are a quorum, one of two is none.
        if leaving.may_stop(node, turn.now_s):
            turn.set(k3s=K3sState())  # what a probe finds from here on is on its way out
            _ensure(turn, Action.STEP_DOWN)
        elif node.k3s.ready or not _is_entering(node, turn.now_s):
            leaving.begin(turn, LeaveStep.STOP)
        return
    if k3s_role(node) is ServerOrAgent.SERVER and not node.drive.prepared:
        _ensure(turn, Action.PREPARE)
        return
    if join_barrier(node) is None or _ordered(node, Action.JOIN):
        if node.drive.registration is None:
            ask(turn)
            return
        _ensure(turn, Action.JOIN)
        if is_kept_out(turn.node, turn.now_s):
            ask(turn)


def _is_stepping_down(node: Node, now_s: float) -> bool:
    drive = node.drive
    running = drive.outcome is Outcome.RUNNING and now_s < drive.ordered_s + ORDER_TIMEOUT_S
    return running and drive.order is not None and drive.order.action is Action.STEP_DOWN


def _is_down(node: Node, now_s: float) -> bool:
    """Whether K3s of a member does not run for long: root looks again, for it does not start one
    that was removed from etcd (K3S.md 7) before its data is aside."""
    down = node.drive.outcome is Outcome.DONE and not node.k3s.running
    return down and now_s >= down_due_s(node)


def down_due_s(node: Node) -> float:
    """When root sees to a member's K3s again, should it not run until then."""
    return max(node.drive.ordered_s, node.phase_since_s) + DOWN_S


def _is_entering(node: Node, now_s: float) -> bool:
    """Whether K3s was started just now: it may become a member at any moment."""
    drive = node.drive
    joining = drive.order is not None and drive.order.action is Action.JOIN
    return joining and not has_etcd(node) and now_s < drive.ordered_s + KEPT_OUT_S


def is_kept_out(node: Node, now_s: float) -> bool:
    """Whether K3s was started and is not ready for long: perhaps its name is taken (K3S.md 7).

    K3s tries by itself for ever; a server that is asked again sees to what is in its way.
    """
    drive = node.drive
    joined = _ordered(node, Action.JOIN) and drive.outcome is Outcome.DONE
    return joined and now_s >= drive.ordered_s + KEPT_OUT_S


def _settle_in(turn: Turn) -> None:
    """Once other servers are ready, the init node is told to follow them like any other.

    Else its ``cluster-init`` would found a second cluster if its data were ever lost. An agent is
    told when none of the servers that it was pointed at is there any more, and of its own new
    address. And what of an order is still to do while K3s is ready is tried again, like any other.
    """
    node = turn.node
    if (node.is_init and ready_urls(node)) or is_adrift(node):
        _ensure(turn, Action.JOIN)
    elif node.drive.order is not None and node.drive.retry_at_s is not None:
        _ensure(turn, node.drive.order.action)


def is_adrift(node: Node) -> bool:
    """Whether an agent's K3s was last told of servers none of which is heard, while others are
    ready, or of an address that this machine has no more.

    K3s's own load balancer follows servers that come and go, but not all at once (K3S.md 8).
    """
    order, ready = node.drive.order, ready_urls(node)
    if k3s_role(node) is not ServerOrAgent.AGENT or order is None or not ready:
        return False
    moved = node.drive.address not in (node.address, *node.also)
    return order.action is Action.JOIN and (moved or not set(ready) & set(order.servers))


def _ordered(node: Node, action: Action) -> bool:
    order = node.drive.order
    return order is not None and order.action is action and order.role is _role(node)


def _role(node: Node) -> ServerOrAgent:
    return k3s_role(node) or ServerOrAgent.SERVER


def _ensure(turn: Turn, action: Action, *, again: bool = False) -> None:
    """Give an order; one that stands only where it is due, or is wanted ``again``."""
    drive = turn.node.drive
    if _ordered(turn.node, action):
        due_s = order_due_s(drive)
        again = again or (is_adrift(turn.node) and drive.outcome is Outcome.DONE)
        if not again and (due_s is None or turn.now_s < due_s):
            return
        attempt = drive.order.attempt + 1 if drive.order else 0
    else:
        attempt = 0
        turn.drive(first_order_s=turn.now_s)
    _remember(turn, action)
    order = replace(_order(turn.node, action), attempt=attempt)
    turn.drive(
        order=order,
        outcome=Outcome.RUNNING,
        result=None,
        retry_at_s=None,
        ordered_s=turn.now_s,
        address=turn.node.address,
    )
    turn.effects.append(WriteOrder(order=order))


def order_due_s(drive: Drive) -> float | None:
    """When the order that stands is given again, as a new attempt; None: it is done."""
    if drive.retry_at_s is None and drive.order is not None and drive.outcome is Outcome.RUNNING:
        return drive.ordered_s + ORDER_TIMEOUT_S
    return drive.retry_at_s


def _remember(turn: Turn, action: Action) -> None:
    """Make durable what must be known after a power cut that follows the order."""
    node = turn.node
    durable = node.durable
    name = durable.node_name or names.choose(node)
    epoch, generation = durable.started_epoch, durable.started_generation
    starts = durable.starts
    if action is Action.INIT and not (node.is_forced and has_own_start(node)):
        epoch, generation = log.epoch(node.log), node.generation.number
    same = (epoch, generation) == (durable.started_epoch, durable.started_generation)
    if action is Action.INIT and node.seal is None and not _ordered(node, action):
        starts = starts + 1 if same else 1
    if not same or (name, starts) != (durable.node_name, durable.starts):
        turn.persist(
            node_name=name, started_epoch=epoch, started_generation=generation, starts=starts
        )


def _order(node: Node, action: Action) -> Order:
    epoch, generation = log.epoch(node.log), node.generation.number
    if action in (Action.STAND_DOWN, Action.INIT):
        epoch, generation = started_epoch(node) or 0, started_generation(node)
    registered = node.drive.registration if action is Action.JOIN else None
    servers: tuple[str, ...] = ()
    flags: Mapping[str, str] = {}
    if action is Action.JOIN and node.seal is not None:
        known = registered.servers if registered else ()
        urls = (*fixed_urls(node), *(ready_urls(node) or known or node.seal.addresses))
        servers = tuple(u for u in dict.fromkeys(urls) if u != own_url(node))[:SERVERS_LIMIT]
        flags = node.seal.shared_flags
    return Order(
        action=action,
        epoch=epoch,
        role=_role(node),
        node_name=node.durable.node_name or node.site.hostname,
        servers=servers or (node.seal.addresses if action is Action.JOIN and node.seal else ()),
        ca_hash=node.seal.ca_hash if node.seal else None,
        k3s_version=registered.k3s_version if registered else None,
        shared_flags=flags,
        instance=node.site.instance,
        node=node.id,
        hardware=node.site.hardware,
        generation=generation,
    )


def on_result(turn: Turn, result: Result) -> None:
    """Take in what ``apply`` says of the order that stands; of another order it means nothing."""
    drive = turn.node.drive
    if drive.order is None or result.order != drive.order or drive.result == result:
        return
    retry_at_s = None
    if result.outcome is Outcome.FAILED:
        pause_s = min(RETRY_LIMIT_S, RETRY_S * 2 ** min(drive.order.attempt, 6))
        # Machines that failed together do not come back together.
        share = ranking.lot(turn.node.site.election_key, turn.node.id)[drive.order.attempt % 32]
        retry_at_s = turn.now_s + pause_s * (1.0 + share / 510)
    elif result.outcome is Outcome.FAILED_FOR_GOOD:
        retry_at_s = turn.now_s + FOR_GOOD_RETRY_S
    prepared = drive.prepared or (
        result.outcome is Outcome.DONE and drive.order.action in (Action.PREPARE, Action.JOIN)
    )
    if drive.order.action is Action.STEP_DOWN and result.outcome is not Outcome.RUNNING:
        # Where it failed, another server may have gone meanwhile: it is asked again.
        turn.set(leaving=None)
    turn.drive(outcome=result.outcome, result=result, retry_at_s=retry_at_s, prepared=prepared)
    if retry_at_s is not None:
        turn.drive(registration=None, asked_s=float("-inf"))
        turn.report(f"{drive.order.action} failed at «{result.step}»: {result.reason}")
    elif result.outcome is Outcome.DONE:
        turn.report(f"{drive.order.action} is done")
    else:
        turn.report(f"{drive.order.action}: {result.step}")


def on_seen(turn: Turn, **seen: Facts | K3sState) -> None:
    """Take in what root found (``facts``) or a probe (``k3s``). K3s that is ready has data by now;
    root may have looked at the disk before K3s had begun."""
    turn.set(**seen)
    state, facts, order = turn.node.k3s, turn.node.facts, turn.node.drive.order
    if not state.ready or facts is None or facts.datastore is not Datastore.NONE:
        return
    action, seal = order.action if order is not None else None, turn.node.seal
    if action in (Action.STAND_DOWN, Action.STEP_DOWN):
        return  # what a probe found was on its way out
    if state.ca_hash is None:
        if order is not None and action is Action.JOIN and order.role is ServerOrAgent.AGENT:
            turn.set(facts=replace(facts, datastore=Datastore.AGENT))
        return
    if order is not None and action is Action.INIT:  # root marked it before K3s began
        epoch, generation = order.epoch, order.generation
        facts = replace(facts, origin=epoch, origin_generation=generation, origin_node=turn.node.id)
    elif seal is None or state.ca_hash != seal.ca_hash:
        return
    turn.set(facts=replace(facts, datastore=Datastore.ETCD, ca_hash=state.ca_hash))


def reset(turn: Turn) -> None:
    """Forget orders of an epoch that is over."""
    turn.set(drive=Drive())
