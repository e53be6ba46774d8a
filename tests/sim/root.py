# SPDX-License-Identifier: Apache-2.0
"""Root's part and K3s itself, as far as the site can see them.

Keeps to ``k3s/apply.py`` (its checks and the order of its steps) and to K3S.md: the first start
chooses the datastore, data that is there wins, a join needs a ready server with the right CA.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from k3sagentd.core.events import FactsRead, K3sProbed, ResultRead
from k3sagentd.core.k3s import (
    Action,
    Datastore,
    K3sState,
    Order,
    Outcome,
    Result,
    ServerOrAgent,
)
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim import cluster
from tests.sim.computer import Computer
from tests.sim.dice import Fault
from tests.sim.promise import majority

if TYPE_CHECKING:
    from tests.sim.world import World

PROBED = (NodePhase.INITIALISING, NodePhase.JOINING, NodePhase.READY, NodePhase.FAILED)
RESTART_S = 5.0
"""RestartSec of K3s's unit."""

Verdict = tuple[Outcome, str | None]
DONE: Verdict = (Outcome.DONE, None)


def take(world: World, m: Computer, order: Order) -> None:
    """An order was written: ``apply`` starts, or takes it when it is done with the last."""
    m.waiting_order = order
    if not m.applying:
        _begin(world, m)


def _begin(world: World, m: Computer) -> None:
    order, m.waiting_order = m.waiting_order, None
    if order is None:
        return
    m.applying = True
    m.applied += 1
    span_s = 0.1 + 0.9 * world.dice.uniform(1, m.number, m.applied)
    lost = world.strikes(Fault.ORDER_LOST, m.number, m.applied)
    if lost and world.dice.uniform(2, m.number, m.applied) < 0.5:
        m.applying = False
        return
    world.at(span_s, _carry_out, world, m, m.power, order, lost)


def _carry_out(world: World, m: Computer, power: int, order: Order, lost: bool) -> None:
    if m.power != power:
        return
    if world.strikes(Fault.INSTALL_FAILS, m.number, m.applied):
        outcome, reason = Outcome.FAILED, "no network"
        m.seen = m.facts()
    else:
        m.seen = m.facts()  # K3s has not begun yet when root looks
        outcome, reason = _do(world, m, order)
    if order.action in (Action.STAND_DOWN, Action.STEP_DOWN):
        m.seen = m.facts()
    if lost:
        m.applying = False
        return
    span_s = 0.1 + 0.4 * world.dice.uniform(3, m.number, m.applied)
    result = Result(order=order, outcome=outcome, step="all", reason=reason)
    world.at(span_s, _finish, world, m, power, result)


def _finish(world: World, m: Computer, power: int, result: Result) -> None:
    if m.power != power:
        return
    m.applying, m.result = False, result
    world.promise.nothing_is_deleted()
    world.tell(m, f"apply: {result.order.action} {result.outcome}")
    look(world, m, m.process)
    _begin(world, m)


def look(world: World, m: Computer, process: int) -> None:
    """The daemon finds the facts and the result that root left."""
    if m.result is None or m.process != process:
        return
    now_s = m.clock(world.now_s)
    if m.seen is not None:
        world.feed(m, FactsRead(now_s=now_s, facts=m.seen))
    world.feed(m, ResultRead(now_s=now_s, result=m.result))


def _do(world: World, m: Computer, order: Order) -> Verdict:
    match order.action:
        case Action.INIT:
            return _init(world, m, order)
        case Action.JOIN:
            return _join(world, m, order)
        case Action.STAND_DOWN:
            return _stand_down(world, m, order)
        case Action.STEP_DOWN:
            return _step_down(world, m, order)
        case _:  # prepare
            return _hopeless(m, join=True) or DONE


def _hopeless(m: Computer, *, join: bool, role: ServerOrAgent | None = None) -> Verdict | None:
    k3s = m.k3s
    if m.plan.install_fails_for_good:
        return Outcome.FAILED_FOR_GOOD, "the memory cgroup is off"
    if k3s.tombstone and not k3s.labelled:
        return Outcome.FAILED_FOR_GOOD, "etcd removed this server from its cluster"
    if join and k3s.store is Datastore.SQLITE:
        return Outcome.FAILED_FOR_GOOD, "a single-node cluster of its own"
    if k3s.store is Datastore.ETCD and role is ServerOrAgent.AGENT:
        return Outcome.FAILED_FOR_GOOD, "the data of a server"
    return None


def _init(world: World, m: Computer, order: Order) -> Verdict:
    k3s = m.k3s
    if hopeless := _hopeless(m, join=False):
        return hopeless
    if k3s.store is Datastore.AGENT:
        return Outcome.FAILED_FOR_GOOD, "the data of an agent"
    if k3s.origin_node == order.node and (k3s.origin_generation, k3s.origin) != _epoch(order):
        return Outcome.FAILED_FOR_GOOD, f"data of epoch {k3s.origin}"
    if order.ca_hash is not None and k3s.store is Datastore.NONE:
        return Outcome.FAILED, "its data is not there"
    if k3s.tombstone:
        return Outcome.FAILED, "this server was removed from its cluster"
    world.promise.starts_k3s(m, order)
    k3s.role, k3s.joining = ServerOrAgent.SERVER, None
    if k3s.store is Datastore.NONE:
        k3s.origin_generation, k3s.origin = _epoch(order)
        k3s.origin_node = NodeId(order.node)
        k3s.name, k3s.labelled, k3s.told = order.node_name, True, True
        _found(world, m)
    _convert(world, m)
    _start(world, m)
    return DONE


def _epoch(order: Order) -> tuple[int, int]:
    return order.generation, order.epoch


def _found(world: World, m: Computer) -> None:
    """K3s starts with ``cluster-init`` and no data: a new cluster."""
    k3s = m.k3s
    text = f"{m.id} {k3s.origin_generation} {k3s.origin} {len(world.promise.founded)}"
    k3s.cluster = hashlib.sha256(text.encode()).hexdigest()
    k3s.store = Datastore.ETCD
    world.promise.founds(m, k3s.cluster, k3s.origin_generation, k3s.origin or 0)
    _become_member(world, m)


def _become_member(world: World, m: Computer) -> None:
    k3s = m.k3s
    found = cluster.of(world, str(k3s.cluster))
    k3s.member = f"{k3s.name}/{m.number}.{k3s.starts}"
    found.members.add(k3s.member)
    found.register(m, str(k3s.name), server=True)


def _convert(world: World, m: Computer) -> None:
    """SQLite becomes etcd and keeps its CA (K3S.md 1)."""
    if m.k3s.store is Datastore.SQLITE:
        m.k3s.store, m.k3s.told = Datastore.ETCD, True
        _become_member(world, m)


def _join(world: World, m: Computer, order: Order) -> Verdict:
    k3s = m.k3s
    if hopeless := _hopeless(m, join=True, role=order.role):
        return hopeless
    if k3s.cluster not in (None, order.ca_hash):
        return Outcome.FAILED_FOR_GOOD, "the data of another cluster"
    member = k3s.store in (Datastore.ETCD, Datastore.AGENT) and not k3s.tombstone
    if not member and not any(_serves(world, m, url, order.ca_hash) for url in order.servers):
        return Outcome.FAILED, "no server can be reached"
    world.promise.starts_k3s(m, order)
    if k3s.tombstone:
        k3s.running = k3s.ready = False
        _put_removed_aside(m)
    if k3s.store is Datastore.AGENT and order.role is ServerOrAgent.SERVER:
        k3s.running = k3s.ready = False  # a promotion: the agent's data goes aside
        k3s.store, k3s.cluster = Datastore.NONE, None
    if k3s.store is Datastore.NONE:
        k3s.role, k3s.name, k3s.labelled = order.role, order.node_name, True
        k3s.told = True
    if k3s.told:  # to an adopted K3s that was etcd before nothing is said
        k3s.joining = order.ca_hash
    _start(world, m)
    return DONE


def _step_down(world: World, m: Computer, order: Order) -> Verdict:
    k3s = m.k3s
    if k3s.store is not Datastore.ETCD:
        if k3s.store is Datastore.NONE:
            k3s.running = k3s.ready = k3s.enabled = False
            k3s.joining = None
        return DONE
    if k3s.cluster != order.ca_hash:
        return Outcome.FAILED_FOR_GOOD, "the data of another cluster"
    members = cluster.of(world, _ca(m)).members
    others = [c for c in cluster.running_members(world, _ca(m), m) if c is not m]
    answers = k3s.ready and cluster.has_quorum(world, _ca(m), m)
    if k3s.member in members and answers and len(others) < majority(len(members)):
        return Outcome.FAILED, "too few other servers are ready"
    world.promise.steps_down(m, str(k3s.cluster))
    k3s.running = k3s.ready = k3s.enabled = False
    k3s.aside.append(str(k3s.cluster))
    _empty(m)
    return DONE


def _put_removed_aside(m: Computer) -> None:
    m.k3s.aside.append(_ca(m))
    m.k3s.store, m.k3s.cluster, m.k3s.member = Datastore.NONE, None, None
    m.k3s.tombstone = False


def _empty(m: Computer) -> None:
    k3s = m.k3s
    k3s.store, k3s.cluster, k3s.member, k3s.joining = Datastore.NONE, None, None, None
    k3s.origin, k3s.origin_generation, k3s.origin_node = None, 0, None
    k3s.tombstone = False


def _serves(world: World, m: Computer, url: str, ca_hash: str | None) -> bool:
    return any(
        other.k3s.ready
        and other.k3s.store is Datastore.ETCD
        and other.k3s.cluster == ca_hash
        and f"https://{other.address}:6443" == url
        and world.network.wired(m, other)
        for other in world.computers
        if other is not m
    )


def _stand_down(world: World, m: Computer, order: Order) -> Verdict:
    k3s = m.k3s
    own = k3s.origin_node == order.node
    if own and (k3s.origin_generation, k3s.origin) != _epoch(order):
        return Outcome.FAILED_FOR_GOOD, f"data of epoch {k3s.origin}"
    if not own and k3s.store is not Datastore.NONE:
        return DONE  # it was there before the site and stays as it is
    k3s.running = k3s.ready = k3s.enabled = False
    if k3s.cluster is not None:
        world.promise.stands_down(m, k3s.cluster)
        k3s.aside.append(k3s.cluster)
    _empty(m)
    return DONE


def _start(world: World, m: Computer) -> None:
    m.k3s.enabled = True
    if not m.k3s.running:
        begin_to_run(world, m)


def begin_to_run(world: World, m: Computer) -> None:
    """K3s's unit starts; it is ready a while later. With a tombstone it does not start."""
    if m.k3s.tombstone:
        return  # check-k3s: it might found another cluster
    m.k3s.running, m.k3s.ready = True, False
    m.k3s.starts += 1
    start_s = m.plan.k3s_start_s * (0.5 + world.dice.uniform(4, m.number, m.k3s.starts))
    world.at(start_s, _becomes_ready, world, m, m.power, m.k3s.starts)
    watch(world, m)


def _is_removed(world: World, m: Computer) -> bool:
    return m.k3s.member not in cluster.of(world, _ca(m)).members


def _becomes_ready(world: World, m: Computer, power: int, starts: int) -> None:
    """What K3s does at a start (K3S.md 1, 4, 7); what fails ends it, and its unit tries again."""
    k3s = m.k3s
    if m.power != power or not k3s.running or k3s.starts != starts:
        return
    if k3s.store is Datastore.ETCD and _is_removed(world, m):
        k3s.tombstone = True
        dies(world, m)
        return
    if k3s.store is Datastore.NONE and not _enter(world, m):
        dies(world, m)
        return
    k3s.ready = True
    watch(world, m)
    stir(world)


def _ca(m: Computer) -> str:
    return str(m.k3s.cluster)


def _enter(world: World, m: Computer) -> bool:
    """Join; False where no server can be reached, or the name is another machine's."""
    k3s = m.k3s
    if k3s.joining is None:
        return False
    found = cluster.of(world, k3s.joining)
    servers = [c for c in cluster.running_members(world, k3s.joining, m) if c is not m]
    if not servers or not cluster.has_quorum(world, k3s.joining, servers[0]):
        return False
    known = found.nodes.get(str(k3s.name))
    if known is not None and (known.node != m.id or (known.server and known.node == m.id)):
        return False  # the node password is another, or the member's name is taken
    k3s.cluster = k3s.joining
    world.promise.joins(m, k3s.joining)
    if k3s.role is ServerOrAgent.SERVER:
        k3s.store = Datastore.ETCD
        _become_member(world, m)
    else:
        k3s.store = Datastore.AGENT
        found.register(m, str(k3s.name), server=False)
    return True


def dies(world: World, m: Computer) -> None:
    """K3s ends; its unit starts it again."""
    if m.k3s.running:
        m.k3s.running = m.k3s.ready = False
        watch(world, m)
        stir(world)
        world.at(RESTART_S, _restarts, world, m, m.power)


def _restarts(world: World, m: Computer, power: int) -> None:
    if m.power == power and m.k3s.enabled and not m.k3s.running:
        begin_to_run(world, m)


def watch(world: World, m: Computer) -> None:
    """Have the daemon probe soon if it cares and would find news."""
    node = m.node
    if node is None or m.probing or node.phase not in PROBED:
        return
    if node.drive.order is None and node.phase is not NodePhase.JOINING:
        return
    if node.k3s == probe(world, m):
        return
    m.probing = True
    world.at(0.2 + world.dice.uniform(5, m.number, m.effects), _probe, world, m, m.process)


def _probe(world: World, m: Computer, process: int) -> None:
    if m.process != process or m.node is None:
        return
    m.probing = False
    order = m.node.drive.order
    if order is not None and order.action in (Action.STAND_DOWN, Action.STEP_DOWN):
        return
    world.feed(m, K3sProbed(now_s=m.clock(world.now_s), state=probe(world, m)))


def probe(world: World, m: Computer) -> K3sState:
    """What a look at the running K3s shows; without a quorum a server is not ready (K3S.md 4)."""
    state = m.probe()
    server = state.ready and m.k3s.store is Datastore.ETCD
    if server and not cluster.has_quorum(world, _ca(m), m):
        return K3sState(running=True, detail="etcd has no quorum")
    return state


def stir(world: World) -> None:
    """Something changed that servers elsewhere may notice."""
    for m in world.computers:
        if m.k3s.ready and m.k3s.store is Datastore.ETCD:
            watch(world, m)
