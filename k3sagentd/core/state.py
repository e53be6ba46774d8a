# SPDX-License-Identifier: Apache-2.0
"""All that a node knows, as one immutable value.

``Site`` is what the operator set, ``Durable`` what must survive a power cut, the rest is gone
with the process and learned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

from k3sagentd.core import log as entries
from k3sagentd.core import paxos
from k3sagentd.core.cluster import ClusterView, Errand, Roster
from k3sagentd.core.k3s import Facts, K3sState, Order, Outcome, Result, ServerOrAgent
from k3sagentd.core.log import Generation, Log, Value
from k3sagentd.core.messages import Hello, Intent, LeaveStep, Registration
from k3sagentd.core.paxos import Acceptor, Ballot, Proposal
from k3sagentd.core.words import NodeId, NodePhase, Role

REFUSED_LIMIT = 16
"""Addresses that are remembered as refused: strangers fill this table."""
PEERS_LIMIT = 512
"""Authenticated peers that are remembered; the ones beyond are not taken in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is configured and does not change while the daemon runs."""

    nodes: int
    servers: int
    role: Role
    election_key: bytes
    hostname: str
    instance: str
    port: int = 6440
    settle_s: float = 3.0
    look_s: float = 1.0
    """How long all ``nodes`` machines look for more: those of one network are heard together."""
    alone_s: float = 10.0
    """How long one machine that is the whole site looks for others at least, as no other's word
    keeps it: mDNS asks four times until then, at growing intervals (RFC 6762, section 5.2)."""
    abandon_after_s: float = 1800.0
    replace_after_s: float = 1800.0
    fixed_addresses: tuple[str, ...] = ()
    """Addresses of the cluster that stay when servers come and go, best first: preferred in every
    registration, with the servers' own as fallback."""
    machine: str | None = None
    """A mark of the machine-id, which no two machines should share; nothing is decided by it."""
    hardware: str | None = None
    """A mark of the hardware, which outlives a new image: who has it is the same machine."""
    tokenless: bool = False
    """It forgot the site's token (``forget-token``): it stays an agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable:
    """What must not be forgotten. Written whole before anything that depends on it."""

    node: NodeId
    nodes: int | None = None
    """``nodes`` as it was at the first vote or the first learned entry."""
    generation: Generation = field(default_factory=Generation)
    """Of the log; never goes back."""
    log: Log = ()
    acceptor: Acceptor = field(default_factory=Acceptor)
    """The votes for decree ``len(log)``, the one that is open."""
    muted: str | None = None
    """Why this identity must never vote again, if so."""
    started_epoch: int | None = None
    """Epoch in which we were told to start a cluster, until we stood down from it."""
    started_generation: int = 0
    """The generation of that epoch."""
    starts: int = 0
    """Runs of the daemon that told K3s to start it."""
    roster: Roster | None = None
    """Which machines are to be servers, as last learned; None: those of the nomination."""
    node_name: str | None = None
    """K3s's name for this node; never changes once chosen."""

    def describe(self) -> str:
        """As people read it: the log, then the votes for the entry that is open."""
        log = " ".join(value.describe() for value in self.log) or "empty"
        parts = [f"generation {self.generation.describe()}"] if self.generation.number else []
        parts.append(f"log {log}")
        if not isinstance(self.log[-1] if self.log else None, entries.Seal):
            parts.append(self.acceptor.describe())
        if self.started_epoch is not None:
            parts.append(f"started epoch {self.started_epoch}")
        if self.roster is not None:
            parts.append(self.roster.describe())
        if self.muted:
            parts.append("muted")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another authenticated node, as far as we heard of it."""

    hello: Hello
    up: bool
    heard_s: float
    """When we last heard of it as one that may vote; while ``able`` we do so now."""
    lost_s: float = float("-inf")
    """When we last heard of it, while it is not up."""
    fetch_s: float = float("-inf")
    """When we last asked it for entries."""
    earlier_instance: str | None = None
    """The instance before ``hello.instance``: if it comes back, two machines share the id."""
    served: bool = False
    """Whether it was seen with a server of the cluster, though its disk may be empty now."""
    flips: int = 0
    """How often in a row it came back."""

    @property
    def able(self) -> bool:
        """Whether we hear it now and it may vote: an init node that may not cannot seal."""
        return self.up and self.hello.may_vote


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparing:
    """Phase 1 of our own ballot is under way."""

    decree: int
    ballot: Ballot
    intent: Intent
    wanted: Value | None
    """What we propose if free; None: chosen from those that promised."""
    promises: Mapping[NodeId, Proposal | None]
    grace_until_s: float
    deadline_s: float
    helped: frozenset[NodeId] = frozenset()
    """Who was behind, was told what is chosen, and was asked again: once, or it never ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepting:
    """Phase 2 of our own ballot is under way."""

    decree: int
    ballot: Ballot
    value: Value
    accepted: frozenset[NodeId]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """Where the drive of this machine's K3s stands."""

    order: Order | None = None
    outcome: Outcome = Outcome.DONE
    result: Result | None = None
    """The last word of ``apply`` on ``order``."""
    retry_at_s: float | None = None
    ordered_s: float = float("-inf")
    """When ``order`` was given."""
    first_order_s: float | None = None
    """When this action was first ordered."""
    address: str | None = None
    """Of this machine, when ``order`` was given."""
    prepared: bool = False
    registration: Registration | None = None
    asked_s: float = float("-inf")
    """When we last asked for a registration, and ``asked`` whom."""
    asked: NodeId | None = None
    asks: int = 0
    """How often in vain."""
    answered: bool = True
    """Whether the one that was asked last has answered."""
    told: str | None = None
    """Why the peer that was asked did not hand a registration out, if so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a peer asked of us as a server, and needs the cluster's API."""

    node_name: str
    heard_s: float
    since_s: float
    """When it was first asked; a look from before does not tell."""
    role: ServerOrAgent | None = None
    """As what it wants to join; None: it wants to leave."""
    step: LeaveStep | None = None
    """How far its leaving is to go."""
    drained: bool = False
    """Its pods are gone, for the step that says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steward:
    """What a server does for the cluster as a whole, and knows of it. Gone with the process."""

    view: ClusterView | None = None
    viewed_s: float = float("-inf")
    lease_since_s: float = float("-inf")
    """When the Lease was first seen as it is in ``view``."""
    errand: Errand | None = None
    """The one under way."""
    ordered_s: float = float("-inf")
    serial: int = 0
    failures: int = 0
    """Errands in a row that failed."""
    not_before_s: float = float("-inf")
    reason: str | None = None
    """Why the last one failed, if it did."""
    wishes: Mapping[NodeId, Wish] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """A step of leaving that this node asks of a server."""

    step: LeaveStep
    asked_s: float = float("-inf")
    asked: NodeId | None = None
    done: bool = False
    refused: str | None = None
    """Why it will not be done, if so."""
    told: str | None = None
    """What it waits for."""


DERIVED = {
    "peers": ("up", "kin", "seen", "ahead", "told_roster"),
    "durable": ("nomination", "seal", "roster", "kin", "ahead", "told_roster"),
}
"""Which of a node's memos a change of a field makes void."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a site: the state of the machine in ``machine.step``.

    Without slots, unlike all else here: each step copies it some times, and a dictionary is copied
    in a fraction of the time of 26 slots. What follows from the fields is computed once.
    """

    site: Site
    durable: Durable
    started_s: float
    now_s: float = 0.0
    """The time of the last event."""
    phase: NodePhase = NodePhase.DISCOVERING
    phase_since_s: float = 0.0
    peers: Mapping[NodeId, Peer] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    last_new_s: float = 0.0
    """When something new was last seen on the wire."""
    proposal: Preparing | Accepting | None = None
    failures: int = 0
    """Our ballots for the open decree that came to nothing."""
    propose_not_before_s: float = 0.0
    highest_round: int = 0
    """The highest round seen for the open decree."""
    votes: Mapping[int, int] = field(default_factory=dict)
    """Acceptances counted by the proposer of an entry, where it told us."""
    last_reject: str | None = None
    facts: Facts | None = None
    """None until root has looked: without facts this node does nothing that needs them."""
    k3s: K3sState = field(default_factory=K3sState)
    drive: Drive = field(default_factory=Drive)
    steward: Steward = field(default_factory=Steward)
    leaving: Leaving | None = None
    unserved_since_s: float | None = None
    """Since when no ready server is heard, after the seal."""
    rostered_s: float = float("-inf")
    """When the roster was learned."""
    short_since_s: float | None = None
    """Since when fewer servers are ready than the site should have."""
    address: str | None = None
    attached_s: float = float("inf")
    """Since when it has that address and a carrier, and so a network to look at."""
    also: tuple[str, ...] = ()
    """Further addresses that this machine has."""
    storage_failure: str | None = None
    split: str | None = None
    """A peer's log contradicts ours: what must never happen, happened; nobody moves."""
    announced: Hello | None = None

    def but(self, **changes: Any) -> Node:
        """This node with some fields changed, like ``dataclasses.replace``."""
        node = object.__new__(Node)
        fields = node.__dict__
        fields.update(self.__dict__)
        fields.update(changes)
        for field_name, memos in DERIVED.items():
            if field_name in changes:
                for memo in memos:
                    fields.pop(memo, None)
        return node

    @property
    def id(self) -> NodeId:
        """Our own node id."""
        return self.durable.node

    @property
    def nodes(self) -> int:
        """The number of voters: frozen as soon as the bootstrap log is not empty."""
        return self.durable.nodes if self.durable.nodes is not None else self.site.nodes

    @property
    def quorum(self) -> int:
        """How many must agree."""
        return paxos.quorum(self.nodes)

    @property
    def log(self) -> Log:
        """The chosen entries, as far as learned."""
        return self.durable.log

    @cached_property
    def up(self) -> tuple[Hello, ...]:
        """The peers that we hear now, by id."""
        return tuple(peer.hello for _, peer in sorted(self.peers.items()) if peer.up)

    @cached_property
    def kin(self) -> tuple[Hello, ...]:
        """Those of them that follow the same bootstrap log."""
        return tuple(hello for hello in self.up if hello.generation == self.generation)

    @cached_property
    def ahead(self) -> tuple[Hello, ...]:
        """The peers whose log is longer, or another."""
        here = (self.generation, len(self.log))
        return tuple(h for h in self.up if h.generation != here[0] or h.log_length > here[1])

    @cached_property
    def told_roster(self) -> Roster | None:
        """The newest roster that our kin know."""
        told = (hello.roster for hello in self.kin if hello.roster is not None)
        return max(told, key=attrgetter("revision"), default=None)

    @cached_property
    def seen(self) -> int:
        """Machines that are here now, this one included."""
        return 1 + len(self.up)

    @cached_property
    def nomination(self) -> entries.Nominate | None:
        """The nomination under way or sealed."""
        return entries.nomination_of(self.log)

    @cached_property
    def seal(self) -> entries.Seal | None:
        """The seal, once learned."""
        return entries.seal_of(self.log)

    @cached_property
    def roster(self) -> Roster:
        """Which machines are to be servers."""
        if self.durable.roster is not None:
            return self.durable.roster
        nomination = self.nomination
        if nomination is None:
            return Roster(revision=0, servers=(), init=entries.NOBODY)
        return Roster(revision=0, servers=nomination.servers, init=nomination.init)

    @property
    def generation(self) -> Generation:
        """Which bootstrap log this node follows."""
        return self.durable.generation

    @property
    def is_forced(self) -> bool:
        """Whether the operator made this node the init node, in the generation that stands."""
        return self.generation.number > 0 and self.generation.by == self.id

    @property
    def is_init(self) -> bool:
        """Whether this node is the init node of the epoch that is under way or sealed."""
        return self.nomination is not None and self.nomination.init == self.id

    def name_of(self, node: NodeId) -> str:
        """What people call ``node``: its name with the start of its id."""
        if node == self.id:
            return self.durable.node_name or self.site.hostname
        peer = self.peers.get(node)
        if peer is None:
            return node[:8]
        return peer.hello.node_name or peer.hello.hostname

    def hears(self, node: NodeId, now_s: float, within_s: float) -> bool:
        """Whether we hear ``node``, able to vote, now or within the last ``within_s`` seconds.

        Who was never heard counts as heard at our own start: a restart must not make us hasty.
        """
        if node == self.id:
            return True
        peer = self.peers.get(node)
        if peer is not None and peer.able:
            return True
        return now_s < (peer.heard_s if peer else self.started_s) + within_s
