# SPDX-License-Identifier: Apache-2.0
"""One machine of the simulated site: what it has, and what of that a power cut takes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from k3sagentd.core.events import Event
from k3sagentd.core.k3s import (
    Datastore,
    Facts,
    K3sState,
    Order,
    Result,
    ServerOrAgent,
)
from k3sagentd.core.messages import Hello, Message
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId
from tests.sim.disk import Disk
from tests.sim.plan import MachinePlan

EARLIER = NodeId("earlier")
"""An identity of before the run: its machine has the disk, and another identity, now."""


@dataclass(slots=True, eq=False)
class K3s:
    """K3s on one machine: its data, and whether it runs (K3S.md 1)."""

    store: Datastore = Datastore.NONE
    cluster: str | None = None
    """Hash of the CA of the cluster that the data belongs to."""
    origin: int | None = None
    """What ``facts.MARKER`` in the data directory says."""
    origin_generation: int = 0
    origin_node: NodeId | None = None
    name: str | None = None
    """The Node that it registers as."""
    member: str | None = None
    """What its etcd data is on the member list."""
    labelled: bool = True
    """Registered by our configuration; else it was there before us."""
    role: ServerOrAgent = ServerOrAgent.SERVER
    """What its unit starts."""
    told: bool = False
    """There is a drop-in of ours: it was installed by us, or converted."""
    joining: str | None = None
    """The CA of the cluster that it was told to join while it is in none."""
    tombstone: bool = False
    """Its data is of a member that etcd has removed, and it has heard of that."""
    enabled: bool = False
    """Its unit starts it with the machine."""
    running: bool = False
    ready: bool = False
    starts: int = 0
    aside: list[str] = field(default_factory=list)
    """Clusters whose data was moved aside."""

    @property
    def was_there(self) -> bool:
        """Whether its cluster, if any, is of before the run, or one that it joined."""
        return self.origin is None or self.origin_node == EARLIER


@dataclass(slots=True, eq=False)
class Computer:
    """A machine, its disk, and the daemon while it runs."""

    number: int
    plan: MachinePlan
    id: NodeId
    disk: Disk
    k3s: K3s
    address: str | None
    wall_s: float
    origin_s: float = 0.0
    """World time at which the monotonic clock stood at 0: the last boot."""
    on: bool = False
    gone: bool = False
    """Never to be switched on again."""
    power: int = 0
    """Counts power cycles: what was scheduled in an earlier one is void."""
    # The daemon's process.
    node: Node | None = None
    process: int = 0
    hello: Hello | None = None
    publishing: bool = False
    held: bool = False
    """Waits for its disk, or is stopped: events queue up."""
    paused: bool = False
    disk_full: bool = False
    inbox: deque[Event] = field(default_factory=deque)
    outbox: dict[NodeId, list[Message]] = field(default_factory=dict)
    tick_at_s: float | None = None
    probing: bool = False
    # Root's part: /run is gone with the power.
    waiting_order: Order | None = None
    applying: bool = False
    result: Result | None = None
    seen: Facts | None = None
    """The facts as root last wrote them."""
    # Counters that key the dice.
    effects: int = 0
    sent: int = 0
    applied: int = 0
    errands: int = 0

    @property
    def hardware(self) -> str:
        """Its hardware's mark, which no new image changes."""
        return f"{self.number:016x}"

    @property
    def name(self) -> str:
        """As people read it."""
        return f"n{self.number}"

    def clock(self, now_s: float) -> float:
        """CLOCK_MONOTONIC: counts from the boot, at its own rate."""
        return (now_s - self.origin_s) * self.plan.clock_rate

    def facts(self) -> Facts:
        """What root would find."""
        server = self.k3s.store in (Datastore.ETCD, Datastore.SQLITE)
        has_data = self.k3s.store is not Datastore.NONE
        return Facts(
            datastore=self.k3s.store,
            origin=self.k3s.origin,
            origin_generation=self.k3s.origin_generation,
            origin_node=self.k3s.origin_node,
            ca_hash=self.k3s.cluster if server else None,
            fsync_ms=self.plan.fsync_ms,
            shared_flags=self.plan.shared_flags,
            node_name=self.k3s.name if server and not self.k3s.labelled else None,
            told_name=self.k3s.name if has_data and self.k3s.labelled else None,
            removed=self.k3s.tombstone and not self.k3s.labelled,
        )

    def probe(self) -> K3sState:
        """What a look at the running K3s shows."""
        if not self.k3s.running:
            return K3sState()
        if not self.k3s.ready:
            return K3sState(running=True, detail="K3s is starting")
        server = self.k3s.store is Datastore.ETCD
        ca_hash = self.k3s.cluster if server else None
        return K3sState(running=True, ready=True, ca_hash=ca_hash, detail="K3s is ready")
