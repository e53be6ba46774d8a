# SPDX-License-Identifier: Apache-2.0
"""The bootstrap log: what a site decides, in which order, and what ends it (design, 4.3).

Decree ``2e`` nominates the init node of epoch ``e``; decree ``2e + 1`` seals or abandons it. A
seal is the last entry for ever. Knows nothing of how a decree is decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from k3sagentd.core.words import NodeId, short

ENTRIES_LIMIT = 2000
"""Entries a log may have: 1000 abandoned epochs are a site that needs a person."""


NOBODY = NodeId("")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Generation:
    """Which bootstrap log it is: 0 is the voters' own, each forced start opens a higher one.

    Beyond 0 nobody votes: the operator's word stands, entered by the node that was forced.
    """

    number: int = 0
    by: NodeId = NOBODY
    """Who was forced; of two with one number the greater id is the higher generation."""

    def describe(self) -> str:
        """As people read it."""
        return f"{self.number}.{short(self.by)}" if self.number else "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nominate:
    """One node may start the cluster; these servers found it (the init node is the first)."""

    init: NodeId
    servers: tuple[NodeId, ...]

    def describe(self) -> str:
        """As people read it."""
        others = ",".join(short(node) for node in self.servers[1:]) or "none"
        return f"nominate(init={short(self.init)} others={others})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The init node's server runs; this is the cluster, and how to know and reach it."""

    ca_hash: str
    addresses: tuple[str, ...]
    shared_flags: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """As people read it."""
        return f"seal(ca={self.ca_hash[:8]} at={','.join(self.addresses)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The epoch's init node will not make the cluster; the next epoch chooses another."""

    reason: str

    def describe(self) -> str:
        """As people read it."""
        return f"abandon({self.reason})"


Value = Nominate | Seal | Abandon
Log = tuple[Value, ...]


def epoch_of(decree: int) -> int:
    """The epoch that decree number ``decree`` belongs to."""
    return decree // 2


def is_nomination(decree: int) -> bool:
    """Whether ``decree`` nominates (else it seals or abandons)."""
    return decree % 2 == 0


def flaw(decree: int, value: Value) -> str | None:
    """Why ``value`` can never stand at ``decree``; None when it can."""
    if is_nomination(decree) != isinstance(value, Nominate):
        return f"{value.describe()} cannot be entry {decree}"
    if isinstance(value, Nominate):
        if not value.servers or value.servers[0] != value.init:
            return "the init node must be the first founding server"
        if len(set(value.servers)) != len(value.servers):
            return "a founding server is named twice"
    return None


def seal_of(log: Log) -> Seal | None:
    """The seal, once there is one."""
    return log[-1] if log and isinstance(log[-1], Seal) else None


def nomination_of(log: Log) -> Nominate | None:
    """The nomination of the epoch that is under way or sealed; None between epochs."""
    if log and isinstance(log[-1], Nominate):
        return log[-1]
    if len(log) >= 2 and isinstance(log[-1], Seal) and isinstance(log[-2], Nominate):
        return log[-2]
    return None


def epoch(log: Log) -> int:
    """The epoch that is under way, or that was sealed."""
    return epoch_of(len(log) - 1 if seal_of(log) else len(log))


def init_of(log: Log, epoch: int) -> NodeId | None:
    """Who was nominated in ``epoch``, as far as this log goes."""
    entry = log[2 * epoch] if 2 * epoch < len(log) else None
    return entry.init if isinstance(entry, Nominate) else None


def is_abandoned(log: Log, epoch: int) -> bool:
    """Whether ``epoch`` is known to have been abandoned."""
    outcome = 2 * epoch + 1
    return outcome < len(log) and isinstance(log[outcome], Abandon)


def abandonments(log: Log) -> Counter[NodeId]:
    """How many epochs of each node were abandoned: who failed least is nominated next."""
    pairs = zip(log[::2], log[1::2], strict=False)
    return Counter(
        first.init
        for first, second in pairs
        if isinstance(first, Nominate) and isinstance(second, Abandon)
    )
