# SPDX-License-Identifier: Apache-2.0
"""A deterministic world around the real core: virtual clock, network, disks and K3s.

Keeps to the shell in ``daemon/``: effects in their order, one event at a time, events queue while
the disk works, messages to a peer that is away wait for it, what one announces is told together.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from k3sagentd.core import machine
from k3sagentd.core.effects import (
    Announce,
    Effect,
    Persist,
    Report,
    Send,
    WriteErrand,
    WriteOrder,
)
from k3sagentd.core.events import (
    AddressChanged,
    Event,
    FactsRead,
    MessageReceived,
    PersistFailed,
    PersistRecovered,
    Tick,
)
from k3sagentd.core.k3s import Datastore
from k3sagentd.core.state import Site
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim import cluster, root
from tests.sim.computer import EARLIER, Computer, K3s
from tests.sim.dice import Dice, Fault
from tests.sim.disk import WRITE_ATOMICALLY, Disk
from tests.sim.network import Network
from tests.sim.plan import MachinePlan, Plan
from tests.sim.promise import BrokenError, Promise

PUBLISH_S = 0.05
"""``daemon.run.ANNOUNCE_DELAY_S``."""
HELD_WATCH_S = 65.0
"""A stopped process: its kernel keeps the connection up until the watch is over."""
PERSIST_RETRY_S = 2.0
STEPS_LIMIT = 500_000
"""Events of a run: thirty times what fifty machines need."""
PHASES = frozenset(map(str, NodePhase))
ELECTION_KEY = b"k" * 32


def abstract(m: Computer) -> tuple[object, ...]:
    """What state a node is in, without ids, times and ballots: for counting how many were seen."""
    node = m.node
    assert node is not None
    order = node.drive.order
    return (
        node.phase,
        len(node.log),
        node.durable.acceptor.promised is not None,
        node.durable.acceptor.accepted is not None,
        type(node.proposal),
        node.durable.muted is not None,
        node.durable.started_epoch,
        node.generation.number > 0,
        node.roster.revision,
        order.action if order else None,
        node.drive.outcome,
        node.k3s.ready,
        m.k3s.store,
        len(node.up),
    )


class World:
    """The site, its wire and its time."""

    def __init__(self, plan: Plan, *, told: bool = False) -> None:
        self.plan = plan
        self.dice = Dice(plan.seed, plan.only)
        self.now_s = 0.0
        self.steps = 0
        self.stormy = True
        self.story: list[str] | None = [] if told else None
        self.happened: Counter[Fault] = Counter()
        self.transitions: Counter[str] = Counter()
        self.inputs: Counter[str] = Counter()
        self.states: set[tuple[object, ...]] = set()
        self.computers: list[Computer] = []
        self.clusters: dict[str, cluster.Cluster] = {}
        self.promise = Promise(self)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.scheduled = 0
        self.network = Network(self)
        for each in plan.machines:
            m = self.add(each)
            self.at(each.boot_s, self.power_on, m)

    # --- time -------------------------------------------------------------------------------

    def at(self, after_s: float, what: Callable[..., None], *arguments: Any) -> None:
        """Do ``what`` later."""
        self.scheduled += 1
        heapq.heappush(self._queue, (self.now_s + after_s, self.scheduled, what, arguments))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, what, arguments = heapq.heappop(queue)
            what(*arguments)
        self.now_s = until_s

    def strikes(self, fault: Fault, *key: int) -> bool:
        """Whether the weather does this now."""
        if not self.stormy:
            return False
        rate = self.plan.rates.get(fault, 0.0)
        if rate == 0.0 and self.plan.only is None:
            return False
        return self.dice.strikes(fault, rate, *key)

    def tell(self, m: Computer, text: str) -> None:
        """Note what happened, where somebody will read it."""
        if self.story is not None:
            self.story.append(f"{self.now_s:9.3f} {m.name:4} {text}")

    # --- machines ---------------------------------------------------------------------------

    def add(self, plan: MachinePlan, id: NodeId | None = None) -> Computer:
        """One more machine, off."""
        number = len(self.computers)
        node = id or NodeId(f"n{number}")
        m = Computer(
            number=number,
            plan=plan,
            id=node,
            disk=Disk(node),
            k3s=K3s(store=plan.store, cluster=plan.cluster, enabled=plan.cluster is not None),
            address=f"10.0.{number}.1",
            wall_s=plan.wall_s,
        )
        self.computers.append(m)
        if plan.cluster is not None:
            self._was_there(m, plan.cluster)
        return m

    def _was_there(self, m: Computer, ca_hash: str) -> None:
        """A cluster that somebody else started, on one machine."""
        m.k3s.name, m.k3s.labelled = m.name, False
        if m.plan.origin is not None:
            m.k3s.origin, m.k3s.origin_node = m.plan.origin, EARLIER
        found = cluster.of(self, ca_hash)
        if m.k3s.store is Datastore.ETCD:
            m.k3s.member = f"{m.name}/before"
            found.members.add(m.k3s.member)
        found.register(m, m.name, server=m.k3s.store is Datastore.ETCD)

    def power_on(self, m: Computer) -> None:
        """Boot: K3s's unit if enabled, then the daemon."""
        if m.on or m.gone:
            return
        m.on, m.origin_s = True, self.now_s
        self.tell(m, "power on")
        if m.k3s.enabled:
            root.begin_to_run(self, m)
        self.start_daemon(m)

    def power_off(self, m: Computer) -> None:
        """Cut the power."""
        if not m.on:
            return
        self.tell(m, "power cut")
        m.on = False
        m.power += 1
        m.disk.power_cut(self.dice.uniform(10, m.number, m.power))
        m.k3s.running = m.k3s.ready = False
        m.waiting_order, m.applying, m.result = None, False, None
        self.stop_daemon(m)
        root.stir(self)

    def start_daemon(self, m: Computer) -> None:
        """The unit starts the daemon."""
        if not m.on or m.node is not None:
            return
        m.process += 1
        site = Site(
            nodes=m.plan.nodes,
            servers=m.plan.servers,
            role=m.plan.role,
            election_key=ELECTION_KEY,
            hostname=m.name,
            instance=f"{m.number}.{m.process}",
            settle_s=self.plan.settle_s,
            abandon_after_s=self.plan.abandon_after_s,
            replace_after_s=self.plan.replace_after_s,
            hardware=m.hardware,
        )
        durable = m.disk.load()
        m.node = machine.new_node(site, durable, m.clock(self.now_s))
        self.promise.boots(m, durable)
        now_s, process = m.clock(self.now_s), m.process
        for event in (
            Tick(now_s=now_s),
            FactsRead(now_s=now_s, facts=m.facts()),
            AddressChanged(now_s=now_s, address=m.address),
        ):
            if m.process == process:
                self.feed(m, event)
        self.network.relink(m)

    def stop_daemon(self, m: Computer) -> None:
        """The process is gone; what its kernel knows goes with the power."""
        m.node, m.hello, m.tick_at_s = None, None, None
        m.publishing = m.held = m.paused = m.probing = False
        m.process += 1
        m.inbox.clear()
        m.outbox.clear()
        self.network.relink(m)

    def pause_daemon(self, m: Computer) -> None:
        """SIGSTOP."""
        if m.node is not None and not m.held:
            m.held = m.paused = True
            process = m.process
            self.at(HELD_WATCH_S, self._watches_end, m, process)

    def _watches_end(self, m: Computer, process: int) -> None:
        if m.process == process and m.paused:
            for other in self.computers:
                if other is not m and self.network.linked(m, other):
                    self.network.lost(other, m, m.id)

    def resume_daemon(self, m: Computer) -> None:
        """SIGCONT."""
        if m.paused:
            m.held = m.paused = False
            self._drain(m)
            for other in self.computers:
                if other is not m and self.network.linked(m, other):
                    self.network.tell_hello(m, other)

    # --- the daemon -------------------------------------------------------------------------

    def feed(self, m: Computer, event: Event) -> None:
        """One event for the core, now or when the process is free."""
        if m.node is None:
            return
        if m.held:
            m.inbox.append(event)
            return
        self.steps += 1
        if self.steps > STEPS_LIMIT:
            raise BrokenError("a site falls silent", f"{self.steps} events")
        kind = event.message if isinstance(event, MessageReceived) else event
        self.inputs[type(kind).__name__] += 1
        m.node, effects = machine.step(m.node, event)
        self.states.add(abstract(m))
        self._carry_out(m, effects, 0)

    def _drain(self, m: Computer) -> None:
        while m.inbox and not m.held:
            self.feed(m, m.inbox.popleft())

    def _carry_out(self, m: Computer, effects: tuple[Effect, ...], start: int) -> None:
        for index in range(start, len(effects)):
            effect = effects[index]
            m.effects += 1
            if self.strikes(Fault.CRASH, m.number, m.effects):
                self._crash(m)
                return
            if self.story is not None:
                self.tell(m, effect.describe())
            match effect:
                case Persist():
                    if not self._persist(m, effects, index):
                        return
                case Announce(hello=hello):
                    self.promise.announces(m, hello)
                    m.hello = hello
                    if not m.publishing:
                        m.publishing = True
                        self.at(PUBLISH_S, self.network.publish, m, m.process)
                case Send(to=to, message=message):
                    self.promise.sends(m, message)
                    self.network.send(m, to, message)
                case WriteOrder(order=order):
                    self.promise.orders(m, order)
                    root.take(self, m, order)
                case WriteErrand(errand=errand):
                    cluster.take(self, m, errand)
                case Report(text=text):
                    self._note(text)
        self._wind(m)
        if m.node is not None and m.node.phase in root.PROBED:
            root.watch(self, m)

    def _crash(self, m: Computer) -> None:
        self.power_off(m)
        self.at(1 + 20 * self.dice.uniform(15, m.number, m.effects), self.power_on, m)

    def _note(self, text: str) -> None:
        before, arrow, rest = text.partition(" -> ")
        if arrow and before in PHASES:
            self.transitions[f"{before} -> {rest}"] += 1

    def _persist(self, m: Computer, effects: tuple[Effect, ...], index: int) -> bool:
        """Write; False where the rest of the effects must wait, or the power failed."""
        effect = effects[index]
        assert isinstance(effect, Persist)
        if self.strikes(Fault.CRASH_IN_WRITE, m.number, m.effects):
            calls = int((len(WRITE_ATOMICALLY) + 1) * self.dice.uniform(16, m.number, m.effects))
            m.disk.save(effect.durable, calls)
            self._crash(m)
            return False
        if m.disk_full:
            failed = PersistFailed(now_s=m.clock(self.now_s), reason="No space left on device")
            m.held = True
            self.inputs["PersistFailed"] += 1
            m.node, more = machine.step(m.node, failed)
            self.at(PERSIST_RETRY_S, self._retry, m, m.process, (*effects, *more), index)
            return False
        if m.plan.persist_s:
            m.held = True
            wait_s = self.dice.exponential(m.plan.persist_s, 17, m.number, m.effects)
            self.at(wait_s, self._written, m, m.process, effects, index)
            return False
        self._saved(m, effect)
        return True

    def _saved(self, m: Computer, effect: Persist) -> None:
        m.disk.save(effect.durable)
        self.promise.persists(m, effect.durable)

    def _retry(self, m: Computer, process: int, effects: tuple[Effect, ...], index: int) -> None:
        if m.process != process:
            return
        if m.disk_full or m.paused:
            self.at(PERSIST_RETRY_S, self._retry, m, process, effects, index)
            return
        self._written(m, process, effects, index)
        if m.process == process:
            self.feed(m, PersistRecovered(now_s=m.clock(self.now_s)))

    def _written(self, m: Computer, process: int, effects: tuple[Effect, ...], index: int) -> None:
        if m.process != process:
            return
        effect = effects[index]
        assert isinstance(effect, Persist)
        m.held = m.paused
        self._saved(m, effect)
        self._carry_out(m, effects, index + 1)
        if m.process == process:
            self._drain(m)

    def _wind(self, m: Computer) -> None:
        if m.node is None:
            return
        at_s = machine.deadline(m.node)
        if at_s is None or at_s == m.tick_at_s:
            return
        m.tick_at_s = at_s
        due_s = at_s / m.plan.clock_rate + m.origin_s
        self.at(max(0.0, due_s - self.now_s), self._tick, m, m.process, at_s)

    def _tick(self, m: Computer, process: int, at_s: float) -> None:
        if m.process == process and m.tick_at_s == at_s:
            m.tick_at_s = None
            now_s = max(at_s, m.clock(self.now_s))
            self.feed(m, Tick(now_s=now_s))

    # --- how it stands ----------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every machine that may be on is part of the cluster."""
        return all(
            m.node is not None and m.node.phase is NodePhase.READY
            for m in self.computers
            if not m.gone
        )

    def copy(self, m: Computer) -> Computer:
        """A clone: same disk, same identity, another machine."""
        other = self.add(m.plan, m.id)
        other.disk.outcomes = m.disk.outcomes[-1:]
        other.k3s = replace(m.k3s, running=False, ready=False, aside=[])
        other.inbox = deque()
        return other
