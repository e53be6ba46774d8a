# SPDX-License-Identifier: Apache-2.0
"""What one run is made of, drawn from one seed: machines, weather, happenings.

A plan is plain data. The world that it describes is deterministic, so a plan *is* a run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from k3sagentd.core.k3s import Datastore
from k3sagentd.core.words import Role
from tests.sim.dice import Fault, Strike


@dataclass(frozen=True, kw_only=True)
class MachinePlan:
    """One machine as it leaves the shelf."""

    nodes: int
    servers: int = 3
    role: Role = Role.AUTO
    boot_s: float = 0.0
    fsync_ms: float = 5.0
    persist_s: float = 0.0
    """Mean time that a write takes; 0: none at all."""
    clock_rate: float = 1.0
    wall_s: float = 1.7e9
    k3s_start_s: float = 2.0
    install_fails_for_good: bool = False
    store: Datastore = Datastore.NONE
    cluster: str | None = None
    """The cluster that was on its disk before the site."""
    origin: int | None = None
    """The epoch in which an earlier identity of the machine made it, where one did."""
    shared_flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Happening:
    """A fault with a time and a place."""

    at_s: float
    fault: Fault
    machine: int = 0
    others: tuple[int, ...] = ()
    for_s: float = 0.0
    amount: int = 0

    def describe(self) -> str:
        """As people read it."""
        parts = [f"{self.at_s:.1f} s: {self.fault}: n{self.machine}"]
        if self.others:
            parts.append("with " + ",".join(f"n{n}" for n in self.others))
        if self.for_s:
            parts.append(f"for {self.for_s:.1f} s")
        if self.amount:
            parts.append(f"({self.amount})")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run."""

    seed: int
    machines: tuple[MachinePlan, ...]
    rates: Mapping[Fault, float] = field(default_factory=dict)
    happenings: tuple[Happening, ...] = ()
    traits: tuple[Fault, ...] = ()
    """Faults that are in the machines from the start, for the report."""
    storm_s: float = 60.0
    """Until here faults happen; then the network heals and every machine that may is on."""
    settle_s: float = 3.0
    abandon_after_s: float = 120.0
    replace_after_s: float = 120.0
    delay_s: float = 0.02
    only: frozenset[Strike] | None = None
    """Exactly these strikes of the weather, when a run is being shrunk."""

    def describe(self) -> str:
        """As people read it."""
        lines = [
            f"seed {self.seed}: {len(self.machines)} machines, "
            f"abandon-after {self.abandon_after_s:.0f} s"
        ]
        for number, m in enumerate(self.machines):
            odd = [
                f"{name}={getattr(m, name)}"
                for name, usual in MachinePlan(nodes=0).__dict__.items()
                if name != "nodes" and getattr(m, name) != usual
            ]
            lines.append(f"  n{number}: nodes={m.nodes} {' '.join(odd)}".rstrip())
        rates = {f: r for f, r in self.rates.items() if r} if self.only is None else {}
        lines += [f"  {fault}: {rate:.3f} of the time" for fault, rate in rates.items()]
        lines += [f"  {fault} at {key}" for fault, key in sorted(self.only or ())]
        lines += [f"  {happening.describe()}" for happening in self.happenings]
        return "\n".join(lines)


def calm(nodes: int, seed: int = 1, **changes: object) -> Plan:
    """A site on a good day."""
    servers = 3 if nodes >= 3 else 1
    chance = random.Random(seed)
    machines = tuple(
        MachinePlan(nodes=nodes, servers=servers, boot_s=chance.uniform(0, 2)) for _ in range(nodes)
    )
    return replace(Plan(seed=seed, machines=machines, storm_s=0.0), **changes)  # type: ignore[arg-type]


SIZES = (1, 2, 3, 3, 3, 3, 3, 4, 5, 5, 5, 5, 5, 6, 7, 9)
WEATHER = {
    Fault.LOSS: 0.4,
    Fault.DUPLICATE: 0.3,
    Fault.DELAY: 0.3,
    Fault.CRASH: 0.03,
    Fault.CRASH_IN_WRITE: 0.15,
    Fault.INSTALL_FAILS: 0.6,
    Fault.ORDER_LOST: 0.3,
}
"""The highest rate of each; a run's own is drawn below it."""
USUAL = (
    Fault.POWER_CUT,
    Fault.POWER_CUT,
    Fault.DAEMON_KILLED,
    Fault.PAUSE,
    Fault.PARTITION,
    Fault.PARTITION,
    Fault.ONE_WAY,
    Fault.BRIDGE,
    Fault.DISK_FULL,
    Fault.CLOCK_JUMP,
    Fault.ADDRESS,
    Fault.K3S_DIES,
    Fault.STRANGER,
)
"""Happenings of which a storm may have any number."""
LATER = (Fault.SERVER_GONE, Fault.LATE, Fault.ROLE)
"""Happenings of the years after the seal."""
AFTER_THE_SEAL = (*LATER, Fault.FORCED)
RARE = (
    Fault.DAMAGE,
    Fault.GONE,
    Fault.REIMAGE_EARLY,
    Fault.REIMAGE_LATE,
    Fault.CLONE,
    Fault.RECONFIGURED,
    Fault.FLAGS,
)
"""Happenings of which a run has one or two: each costs a voter."""
TRAITS = (
    Fault.SLOW_DISK,
    Fault.SLOW_K3S,
    Fault.NO_INSTALL,
    Fault.LATE_BOOT,
    Fault.CLOCK_RATE,
    Fault.AGENT_ROLE,
)
WRONG = (
    Fault.OTHER_NODES,
    Fault.OTHER_SERVERS,
    Fault.EXTRA,
    Fault.SQLITE,
    Fault.ETCD,
    Fault.TWO_CLUSTERS,
)
LARGEST = 50
LARGE_SHARE = 1 / 500
CALM_SHARE = 0.1


def draw(seed: int) -> Plan:
    """The plan of a seed: some runs calm, some of one fault alone, some of all at once."""
    chance = random.Random(seed)
    nodes = chance.choice(SIZES)
    if chance.random() < LARGE_SHARE:
        nodes = chance.randint(10, LARGEST)
    plan = calm(nodes, seed)
    plan = replace(
        plan,
        settle_s=chance.choice((0.5, 3.0, 10.0)),
        abandon_after_s=chance.choice((15.0, 60.0, 300.0, 1800.0)),
        delay_s=chance.choice((0.002, 0.02, 0.2)),
        replace_after_s=chance.choice((15.0, 60.0, 1800.0)),
    )
    if chance.random() < CALM_SHARE:
        return plan
    storm_s = chance.choice((20.0, 120.0, 600.0))
    appetite = chance.random() ** 2
    plan = replace(
        plan,
        storm_s=storm_s,
        rates={
            fault: limit * chance.random() ** 2 if chance.random() < appetite else 0.0
            for fault, limit in WEATHER.items()
        },
    )
    for trait in TRAITS:
        if chance.random() < appetite / 3:
            plan = _with_trait(plan, trait, chance)
    if chance.random() < 0.2:
        plan = _with_trait(plan, chance.choice(WRONG), chance)
    many = int(chance.expovariate(1 / (1 + 12 * appetite)))
    happenings = [_happening(chance.choice(USUAL), plan, chance) for _ in range(many)]
    if chance.random() < 0.35:
        rare = chance.choice(RARE)
        happenings += [_happening(rare, plan, chance) for _ in range(chance.choice((1, 1, 2)))]
    if chance.random() < 0.3:
        many = chance.choice((1, 1, 2, 3))
        happenings += [_happening(chance.choice(LATER), plan, chance) for _ in range(many)]
    if chance.random() < 0.05:
        happenings.append(_happening(Fault.FORCED, plan, chance))
    return replace(plan, happenings=tuple(sorted(happenings, key=lambda h: h.at_s)))


def focused(seed: int, focus: tuple[Fault, ...]) -> Plan:
    """The plan of a seed with more of some faults, early: to look closely at one corner."""
    plan = draw(seed)
    chance = random.Random(-seed - 1)
    plan = replace(plan, storm_s=max(plan.storm_s, 20.0))
    rates, happenings = dict(plan.rates), list(plan.happenings)
    for fault in focus:
        if fault in WEATHER:
            rates[fault] = WEATHER[fault] * chance.random()
            continue
        several = [_happening(fault, plan, chance) for _ in range(chance.randint(1, 3))]
        if fault not in AFTER_THE_SEAL:
            several = [replace(each, at_s=chance.uniform(0, 8)) for each in several]
        happenings += several
    happenings.sort(key=lambda h: h.at_s)
    return replace(plan, rates=rates, happenings=tuple(happenings))


def _happening(fault: Fault, plan: Plan, chance: random.Random) -> Happening:
    count = len(plan.machines)
    numbers = list(range(count))
    # Most of what matters happens in the first seconds, while the site elects and starts.
    at_s = chance.uniform(0, plan.storm_s) if chance.random() < 0.4 else chance.uniform(0, 15)
    others: tuple[int, ...] = ()
    amount = 0
    if fault in (Fault.PARTITION, Fault.ONE_WAY, Fault.BRIDGE):
        others = tuple(sorted(chance.sample(numbers, chance.randint(1, max(1, count - 1)))))
    if fault is Fault.CLOCK_JUMP:
        amount = chance.choice((-(10**9), -3600, 3600, 10**9))
    if fault is Fault.DAMAGE:
        amount = chance.randint(0, 1000)
    if fault is Fault.ROLE:
        amount = chance.randint(0, 2)
    if fault is Fault.LATE:
        amount = chance.choice((1, 1, 3, 10))
    if fault in AFTER_THE_SEAL:
        at_s = chance.uniform(5, plan.storm_s)
    if fault is Fault.RECONFIGURED:
        amount = plan.machines[0].nodes + chance.choice((-2, -1, 1, 2))
    for_s = chance.choice((1.0, 10.0, 60.0, plan.storm_s)) * chance.random()
    if fault is Fault.PAUSE and chance.random() < 0.3:
        for_s = 3600.0
    return Happening(
        at_s=min(at_s, plan.storm_s),
        fault=fault,
        machine=chance.choice(numbers),
        others=others,
        for_s=for_s,
        amount=amount,
    )


def _with_trait(plan: Plan, trait: Fault, chance: random.Random) -> Plan:
    machines = list(plan.machines)
    nodes = machines[0].nodes
    number = chance.randrange(len(machines))
    another = (number + 1) % len(machines)
    one = machines[number]
    match trait:
        case Fault.SLOW_DISK:
            changes: dict[str, object] = {"persist_s": chance.choice((0.05, 1.0)), "fsync_ms": 80.0}
        case Fault.SLOW_K3S:
            changes = {"k3s_start_s": chance.choice((30.0, 400.0))}
        case Fault.NO_INSTALL:
            changes = {"install_fails_for_good": True}
        case Fault.LATE_BOOT:
            changes = {"boot_s": chance.uniform(5, plan.storm_s + 5)}
        case Fault.CLOCK_RATE:
            changes = {"clock_rate": chance.choice((0.9, 1.1))}
        case Fault.AGENT_ROLE:
            changes = {"role": Role.AGENT}
        case Fault.OTHER_NODES:
            changes = {"nodes": max(1, nodes + chance.choice((-2, -1, 1, 2)))}
        case Fault.OTHER_SERVERS:
            changes = {"servers": 1 if one.servers == 3 else 3}
        case Fault.SQLITE:
            changes = {"store": Datastore.SQLITE, "cluster": "5" * 64}
        case Fault.ETCD:
            # By the seed, without a throw: the other dice of a seed that is known stay as they are.
            changes = {"store": Datastore.ETCD, "cluster": "e" * 64}
            changes["origin"] = (None, 0, 1)[plan.seed % 3]
        case Fault.TWO_CLUSTERS:
            changes = {"store": Datastore.ETCD, "cluster": "e" * 64}
            if another != number:
                machines[another] = replace(
                    machines[another], store=Datastore.ETCD, cluster="f" * 64
                )
        case _:  # Fault.EXTRA
            changes = {}
            machines.append(replace(one, boot_s=chance.uniform(0, plan.storm_s)))
    machines[number] = replace(one, **changes)  # type: ignore[arg-type]
    return replace(plan, machines=tuple(machines), traits=(*plan.traits, trait))
