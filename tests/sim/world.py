# SPDX-License-Identifier: Apache-2.0
"""A deterministic world around the real core: virtual clock, network, disks and K3s.

A seed reproduces a run. Faults: loss, delay, duplication, reordering, partitions, power cuts at
any effect. Whatever an effect before the cut made durable stays; the rest is gone.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from k3sagentd.core import machine
from k3sagentd.core.effects import Announce, Effect, Persist, Report, Send, WriteOrder
from k3sagentd.core.events import (
    AddressChanged,
    Event,
    FactsRead,
    HelloReceived,
    K3sProbed,
    MessageReceived,
    PeerLost,
    ResultRead,
    Tick,
)
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
from k3sagentd.core.log import Abandon, Seal
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Durable, Node, Site
from k3sagentd.core.words import NodeId, NodePhase, Role


def node_id(number: int) -> NodeId:
    """The id of machine ``number``."""
    return NodeId(hashlib.sha256(f"node {number}".encode()).hexdigest()[:32])


@dataclass
class Machine:
    """One machine: what survives a power cut, and the node while it is on."""

    number: int
    site: Site
    durable: Durable
    node: Node | None = None
    boots: int = 0
    hello: Hello | None = None
    facts: Facts = field(default_factory=Facts)
    k3s_of: str | None = None
    """The cluster (CA hash) that its K3s data belongs to."""
    tick_at_s: float | None = None
    install_fails: bool = False
    swallows: int = 0
    """So many orders are taken and never answered."""


class World:
    """The site, its wire and its time."""

    def __init__(self, seed: int, nodes: int, **options: float) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.loss = options.pop("loss", 0.0)
        self.crash = options.pop("crash", 0.0)
        self.delay_s = options.pop("delay_s", 0.02)
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.counter = 0
        self.story: list[str] = []
        self.groups: dict[NodeId, int] = {}
        self.founded: dict[str, NodeId] = {}
        self.joined: dict[NodeId, str] = {}
        self.machines: dict[NodeId, Machine] = {}
        for number in range(nodes):
            self.add(number, nodes, **options)

    def add(self, number: int, nodes: int, **options: float) -> Machine:
        """One more machine, off."""
        me = node_id(number)
        site = Site(
            nodes=nodes,
            servers=3 if nodes >= 3 else 1,
            role=Role.AUTO,
            election_key=b"key",
            hostname=f"n{number}",
            instance="",
            **options,  # type: ignore[arg-type]
        )
        self.machines[me] = Machine(number, site, Durable(node=me))
        self.groups[me] = 0
        return self.machines[me]

    # --- time -------------------------------------------------------------------------------

    def at(self, after_s: float, what: Callable[[], None]) -> None:
        """Do ``what`` later."""
        self.counter += 1
        heapq.heappush(self.queue, (self.now_s + after_s, self.counter, what))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self.queue and self.queue[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self.queue)
            what()
            self.check()
        self.now_s = until_s

    # --- machines ---------------------------------------------------------------------------

    def power_on(self, m: Machine) -> None:
        """Boot."""
        if m.node is not None:
            return
        m.boots += 1
        site = Site(**{k: getattr(m.site, k) for k in Site.__slots__} | {"instance": str(m.boots)})
        m.node = machine.new_node(site, m.durable, self.now_s)
        m.hello = None
        for event in (
            Tick(now_s=self.now_s),
            FactsRead(now_s=self.now_s, facts=m.facts),
            AddressChanged(now_s=self.now_s, address=f"10.0.0.{m.number + 1}"),
        ):
            self.feed(m, event)
        for other in self.machines.values():
            self.connect(m, other)
        if m.k3s_of is not None and m.node is not None:
            self._probe_later(m)

    def power_off(self, m: Machine) -> None:
        """Cut the power."""
        m.node, m.tick_at_s = None, None
        self.story.append(f"{self.now_s:8.3f} n{m.number} loses power")
        for other in self.machines.values():
            self.disconnect(m, other)

    def linked(self, a: Machine, b: Machine) -> bool:
        """Whether the wire between two machines is whole and both are on."""
        same = self.groups[a.durable.node] == self.groups[b.durable.node]
        return a is not b and same and a.node is not None and b.node is not None

    def partition(self, *groups: set[int]) -> None:
        """Cut the wire."""
        for m in self.machines.values():
            number = next((i for i, group in enumerate(groups, 1) if m.number in group), 0)
            self.groups[m.durable.node] = number
        for a in self.machines.values():
            for b in self.machines.values():
                if a.number < b.number:
                    (self.connect if self.linked(a, b) else self.disconnect)(a, b)

    def connect(self, a: Machine, b: Machine) -> None:
        """Both hear of each other, sooner or later."""
        for here, there in ((a, b), (b, a)):
            self.at(self._delay(), lambda h=here, t=there: self._greet(h, t))

    def _greet(self, here: Machine, there: Machine) -> None:
        if self.linked(here, there) and there.hello is not None:
            self.feed(here, HelloReceived(now_s=self.now_s, hello=there.hello))

    def disconnect(self, a: Machine, b: Machine) -> None:
        """Both notice, after the keepalive."""
        for here, there in ((a, b), (b, a)):
            self.at(5 + self._delay(), lambda h=here, t=there: self._lose(h, t))

    def _lose(self, here: Machine, there: Machine) -> None:
        if not self.linked(here, there):
            self.feed(here, PeerLost(now_s=self.now_s, peer=there.durable.node))

    def _delay(self) -> float:
        return self.random.expovariate(1 / self.delay_s)

    # --- core -------------------------------------------------------------------------------

    def feed(self, m: Machine, event: Event) -> None:
        """One event; its effects in order, unless the power fails among them."""
        if m.node is None:
            return
        m.node, effects = machine.step(m.node, event)
        for effect in effects:
            if self.crash and self.random.random() < self.crash:
                self.power_off(m)
                self.at(self.random.uniform(1, 20), lambda: self.power_on(m))
                return
            self._do(m, effect)
            if m.node is None:
                return
        self._wind(m)

    def _wind(self, m: Machine) -> None:
        assert m.node is not None
        at_s = machine.deadline(m.node)
        if at_s is not None and at_s != m.tick_at_s:
            m.tick_at_s = at_s
            node_boot = m.boots

            def tick() -> None:
                if m.boots == node_boot and m.tick_at_s == at_s:
                    m.tick_at_s = None
                    self.feed(m, Tick(now_s=self.now_s))

            self.at(max(0.0, at_s - self.now_s), tick)

    def _do(self, m: Machine, effect: Effect) -> None:
        match effect:
            case Persist(durable=durable):
                m.durable = durable
            case Announce(hello=hello):
                m.hello = hello
                for other in self.machines.values():
                    if self.linked(m, other):
                        self.at(self._delay(), lambda o=other: self._greet(o, m))
            case Send(to=to, message=message):
                receiver, sender = self.machines[to], m.durable.node
                for _ in range(1 + (self.random.random() < self.loss)):
                    if self.random.random() >= self.loss and self.linked(m, receiver):
                        self.at(
                            self._delay(),
                            lambda: self.feed(
                                receiver,
                                MessageReceived(now_s=self.now_s, sender=sender, message=message),
                            ),
                        )
            case WriteOrder(order=order):
                self._order(m, order)
            case Report(text=text):
                self.story.append(f"{self.now_s:8.3f} n{m.number} {text}")

    # --- K3s --------------------------------------------------------------------------------

    def _order(self, m: Machine, order: Order) -> None:
        seals = any(isinstance(e, Seal) for x in self.machines.values() for e in x.durable.log)
        if order.action in (Action.PREPARE, Action.JOIN):
            assert seals, f"n{m.number} touches K3s before the seal\n{self.told()}"
        boot = m.boots

        def done() -> None:
            if m.boots != boot or m.node is None:
                return
            if m.swallows:
                m.swallows -= 1
                return
            self._carry_out(m, order)

        self.at(self.random.uniform(0.1, 1.0), done)

    def _carry_out(self, m: Machine, order: Order) -> None:
        outcome, reason = Outcome.DONE, None
        match order.action:
            case Action.INIT if m.install_fails:
                outcome, reason = Outcome.FAILED_FOR_GOOD, "no memory cgroup"
            case Action.INIT if m.k3s_of is None:
                m.k3s_of = hashlib.sha256(f"{m.number} {order.epoch}".encode()).hexdigest()
                self.founded[m.k3s_of] = m.durable.node
                m.facts = replace(
                    m.facts, datastore=Datastore.ETCD, origin=order.epoch, ca_hash=m.k3s_of
                )
            case Action.JOIN if m.k3s_of is None:
                m.k3s_of = order.ca_hash
                self.joined[m.durable.node] = str(order.ca_hash)
                server = order.role is ServerOrAgent.SERVER
                store = Datastore.ETCD if server else Datastore.AGENT
                m.facts = replace(m.facts, datastore=store, ca_hash=m.k3s_of)
            case Action.STAND_DOWN:
                m.k3s_of, m.facts = None, Facts(shared_flags=m.facts.shared_flags)
        self.feed(m, FactsRead(now_s=self.now_s, facts=m.facts))
        result = Result(order=order, outcome=outcome, step="all", reason=reason)
        self.feed(m, ResultRead(now_s=self.now_s, result=result))
        self._probe_later(m)

    def _probe_later(self, m: Machine) -> None:
        boot, cluster = m.boots, m.k3s_of

        def probe() -> None:
            if m.boots == boot and m.node is not None and m.k3s_of == cluster and cluster:
                agent = m.facts.datastore is Datastore.AGENT
                state = K3sState(running=True, ready=True, ca_hash=None if agent else cluster)
                self.feed(m, K3sProbed(now_s=self.now_s, state=state))

        self.at(self.random.uniform(0.5, 4.0), probe)

    # --- the promise ------------------------------------------------------------------------

    def check(self) -> None:
        """The invariants, after every step."""
        check_logs_agree(self)
        check_one_cluster(self)
        check_abandoned_have_no_members(self)

    def told(self) -> str:
        """What happened, for a failed assertion."""
        return "\n".join(self.story[-60:])

    @property
    def complete(self) -> bool:
        """Every machine is on and part of the cluster."""
        return all(m.node and m.node.phase is NodePhase.READY for m in self.machines.values())


def check_logs_agree(world: World) -> None:
    """Of any two logs, one begins with the other."""
    logs = sorted((m.durable.log for m in world.machines.values()), key=len)
    for shorter, longer in itertools.pairwise(logs):
        assert longer[: len(shorter)] == shorter, f"logs differ\n{world.told()}"


def check_one_cluster(world: World) -> None:
    """All that ever joined, joined one cluster; and it is the one that was sealed."""
    seals = {e.ca_hash for m in world.machines.values() for e in m.durable.log if type(e) is Seal}
    assert len(seals) <= 1, f"two seals\n{world.told()}"
    assert set(world.joined.values()) <= seals, f"joined what is not sealed\n{world.told()}"


def check_abandoned_have_no_members(world: World) -> None:
    """Whoever founded in an epoch that was abandoned was never joined."""
    for m in world.machines.values():
        started = m.durable.started_epoch
        if started is None or 2 * started + 1 >= len(m.durable.log):
            continue
        if isinstance(m.durable.log[2 * started + 1], Abandon) and m.k3s_of is not None:
            others = {n for n, ca in world.joined.items() if ca == m.k3s_of}
            assert not others, f"an abandoned cluster has members\n{world.told()}"
