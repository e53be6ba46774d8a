# SPDX-License-Identifier: Apache-2.0
"""What nodes say to each other. The sender's id is not in here: TLS vouches for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from k3sagentd.core.cluster import Roster
from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.core.log import Generation, Value
from k3sagentd.core.paxos import Ballot, Proposal
from k3sagentd.core.words import NodeId, NodePhase, Role


class Intent(StrEnum):
    """What a proposer means to propose where it is free to choose."""

    NOMINATE = "nominate"
    SEAL = "seal"
    ABANDON = "abandon"


class LeaveStep(StrEnum):
    """What a node that leaves asks of a server: its pods go, it may stop, its Node object goes."""

    DRAIN = "drain"
    STOP = "stop"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a node tells of itself to whoever knocks; newer ones replace older ones."""

    node: NodeId
    instance: str
    """Random for each start of the daemon: two at a time under one node id are clones."""
    revision: int
    """Grows with each change within one instance, so that an old answer is not taken as new."""
    hostname: str
    node_name: str | None
    """K3s's node name, once chosen."""
    address: str | None
    """IP address of the chosen interface."""
    port: int
    nodes: int
    servers: int
    role: Role
    fitness: int
    """0 is best: the class of fsync latency (``ranking.fitness_class``)."""
    may_vote: bool
    has_voted: bool
    """Whether its bootstrap log is not empty: it voted or learned something."""
    log_length: int
    existing: str | None
    """The cluster that its K3s data belongs to, where that was there before the site."""
    existing_epoch: int | None
    """The epoch that made this data, where it was one of ours: that may be abandoned by now."""
    datastore: Datastore
    phase: NodePhase
    k3s_role: ServerOrAgent | None
    prepared: bool
    """Downloaded and preflight passed: joining takes only a start."""
    server_url: str | None
    """``https://host:6443`` while its server is ready."""
    machine: str | None = None
    """A mark of its machine-id; two nodes with one were copied from one card."""
    generation: Generation = field(default_factory=Generation)
    existing_generation: int = 0
    """The generation of ``existing_epoch``."""
    existing_by: NodeId | None = None
    """Who started it in that epoch: perhaps an earlier identity, by another log."""
    roster: Roster | None = None
    """The newest that it knows; None: the nomination's."""
    member: bool = False
    """It is, or may be about to be, a member of etcd: its server was started."""
    adopted: bool = False
    """Its K3s was there before us: its role is not ours to change."""
    sound: bool = True
    """Its last order did not fail; who tries again and again is no candidate."""
    hardware: str | None = None
    """A mark of its hardware; of two nodes with one, one is gone."""
    moved: bool = False
    """Etcd knows this server by an address that its machine does not have: until that is mended it
    is no part of a quorum. False also where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Phase 1a. The intent lets acceptors that hear the init node refuse to abandon it."""

    decree: int
    ballot: Ballot
    intent: Intent
    nodes: int
    """Among how many the proposer counts: who counts otherwise must not be counted."""

    def describe(self) -> str:
        """As people read it."""
        return f"prepare {self.ballot.describe()} entry={self.decree} to {self.intent}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Phase 1b."""

    decree: int
    ballot: Ballot
    accepted: Proposal | None

    def describe(self) -> str:
        """As people read it."""
        before = f" after {self.accepted.describe()}" if self.accepted else ""
        return f"promise {self.ballot.describe()} entry={self.decree}{before}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Phase 2a."""

    decree: int
    ballot: Ballot
    value: Value
    nodes: int
    """As in ``Prepare``."""

    def describe(self) -> str:
        """As people read it."""
        return f"accept {self.ballot.describe()} entry={self.decree} {self.value.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Phase 2b."""

    decree: int
    ballot: Ballot

    def describe(self) -> str:
        """As people read it."""
        return f"accepted {self.ballot.describe()} entry={self.decree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """No promise, or no acceptance, and why."""

    decree: int
    ballot: Ballot
    promised: Ballot | None
    """The higher ballot that stands in the way, if that is the reason."""
    log_length: int
    reason: str

    def describe(self) -> str:
        """As people read it."""
        return f"reject {self.ballot.describe()} entry={self.decree}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Chosen entries from number ``first`` on."""

    first: int
    entries: tuple[Value, ...]
    nodes: int
    """Among how many the sender counts; until the seal, who counts otherwise stays out."""
    generation: Generation = field(default_factory=Generation)
    """Whose entries these are."""
    votes: int | None = None
    """Acceptances that the proposer had counted for the last entry; only for people."""

    def describe(self) -> str:
        """As people read it."""
        entries = " ".join(value.describe() for value in self.entries)
        return f"learned from entry={self.first}: {entries}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Asks for the chosen entries from number ``first`` on."""

    first: int
    generation: Generation = field(default_factory=Generation)

    def describe(self) -> str:
        """As people read it."""
        return f"fetch from entry={self.first}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationRequest:
    """Asks a node of a sealed site where to join."""

    role: ServerOrAgent
    node_name: str
    """K3s's name for the node: whose Node object may still be there."""

    def describe(self) -> str:
        """As people read it."""
        return f"ask for a registration of {self.node_name} as {self.role}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Where to join, and what the cluster requires (design, 4.5)."""

    servers: tuple[str, ...]
    """Registration addresses, in this joiner's own order."""
    ca_hash: str
    k3s_version: str | None = None
    """``ClusterView.release``; None where who answers has not looked."""
    shared_flags: Mapping[str, str] = field(default_factory=dict)
    role: ServerOrAgent = ServerOrAgent.AGENT

    def describe(self) -> str:
        """As people read it."""
        return f"registration ca={self.ca_hash[:8]} at={','.join(self.servers)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NotYet:
    """No registration for now, and what it waits for; ask again."""

    reason: str
    soon: bool = False
    """It is a matter of seconds: what would be known then is old news a minute later."""

    def describe(self) -> str:
        """As people read it."""
        return f"not yet: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveRequest:
    """Asks a server to help this node out of the cluster."""

    step: LeaveStep
    node_name: str

    def describe(self) -> str:
        """As people read it."""
        return f"ask to {self.step} {self.node_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAnswer:
    """How far the server is with a step."""

    step: LeaveStep
    done: bool
    waits_for: str | None = None
    refused: str | None = None

    def describe(self) -> str:
        """As people read it."""
        said = "done" if self.done else f"refused: {self.refused}" if self.refused else "not yet"
        return f"{self.step}: {said}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloned:
    """Tells a node that two live machines answer under its id, seen by a third."""

    address: str | None

    def describe(self) -> str:
        """As people read it."""
        return f"cloned, also at {self.address}"


Message = (
    Prepare
    | Promise
    | Accept
    | Accepted
    | Reject
    | Learned
    | Fetch
    | Cloned
    | RegistrationRequest
    | Registration
    | NotYet
    | LeaveRequest
    | LeaveAnswer
)
