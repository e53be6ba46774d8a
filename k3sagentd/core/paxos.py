# SPDX-License-Identifier: Apache-2.0
"""Single-decree Paxos: the acceptor's two rules and the proposer's one.

Source: L. Lamport, "Paxos Made Simple" (2001), section 2.2: P1a is ``promise``, P2b is kept by
``constrained``. An acceptor's new state must be durable before its answer leaves (section 2.5).
Knows nothing of epochs, nodes' roles or K3s; it never looks into a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from k3sagentd.core.log import Value
from k3sagentd.core.words import NodeId


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Ballot:
    """A ballot number: rounds first, the proposer's id breaks ties, so no two nodes share one."""

    round: int
    node: NodeId

    def describe(self) -> str:
        """As people read it: ``3.7f3a12bc``."""
        return f"{self.round}.{self.node[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A value with the ballot under which it was accepted."""

    ballot: Ballot
    value: Value

    def describe(self) -> str:
        """As people read it."""
        return f"{self.value.describe()} at {self.ballot.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptor:
    """What an acceptor must never forget about the decree that is open."""

    promised: Ballot | None = None
    accepted: Proposal | None = None

    def describe(self) -> str:
        """As people read it."""
        if self.promised is None:
            return "no vote"
        accepted = f", accepted {self.accepted.describe()}" if self.accepted else ""
        return f"promised {self.promised.describe()}{accepted}"

    @property
    def blank(self) -> bool:
        """Nothing was ever promised for this decree."""
        return self.promised is None


def promise(acceptor: Acceptor, ballot: Ballot) -> Acceptor | None:
    """Phase 1b: the acceptor after its promise, or None where a higher ballot has its word."""
    if acceptor.promised is not None and ballot < acceptor.promised:
        return None
    return replace(acceptor, promised=ballot)


def accept(acceptor: Acceptor, ballot: Ballot, value: Value) -> Acceptor | None:
    """Phase 2b: the acceptor after accepting, or None where a higher ballot has its word."""
    if acceptor.promised is not None and ballot < acceptor.promised:
        return None
    return Acceptor(promised=ballot, accepted=Proposal(ballot=ballot, value=value))


def constrained(promises: Iterable[Proposal | None]) -> Proposal | None:
    """Phase 2a: the accepted proposal with the highest ballot among a quorum's promises.

    Where there is one, its value and no other may be proposed; None leaves the choice free.
    """
    return max((p for p in promises if p is not None), key=lambda p: p.ballot, default=None)


def quorum(nodes: int) -> int:
    """The smallest number of voters any two sets of which share a member."""
    return nodes // 2 + 1
