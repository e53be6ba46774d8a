# SPDX-License-Identifier: Apache-2.0
"""Where to knock: the one table that mDNS, seeds and callers fill.

Nothing in it is believed, anybody on the wire can fill it. So it is bounded, and what never
proved to be a peer goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

TARGETS_LIMIT = 1024


class Source(StrEnum):
    """Who told us."""

    MDNS = "mdns"
    SEED = "seed"
    CALLER = "caller"


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """A place where a peer may listen."""

    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(slots=True)
class _Row:
    sources: set[Source] = field(default_factory=set)
    proven: bool = False


class Table:
    """The targets, in the order of their first sighting."""

    def __init__(self, limit: int = TARGETS_LIMIT) -> None:
        self._limit = limit
        self._rows: dict[Target, _Row] = {}

    def __contains__(self, target: Target) -> bool:
        return target in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, target: Target, source: Source) -> Target | None:
        """Enter a sighting; returns the target that had to go for it, if one had to.

        A table that is full of proven peers takes nothing in: then ``target`` itself is returned.
        """
        row = self._rows.get(target)
        if row is not None:
            row.sources.add(source)
            return None
        evicted = None
        if len(self._rows) >= self._limit:
            evicted = next((each for each, row in self._rows.items() if _expendable(row)), None)
            if evicted is None:
                return target
            del self._rows[evicted]
        self._rows[target] = _Row(sources={source})
        return evicted

    def prove(self, target: Target, *, proven: bool) -> None:
        """Note whether an authenticated peer answers at ``target``."""
        if target in self._rows:
            self._rows[target].proven = proven

    def withdraw(self, target: Target, source: Source) -> None:
        """``source`` does not name ``target`` any more; it stays until it fails."""
        if target in self._rows:
            self._rows[target].sources.discard(source)

    def named(self, target: Target) -> bool:
        """Whether mDNS or a seed names it still."""
        row = self._rows.get(target)
        return row is not None and bool(row.sources - {Source.CALLER})

    def drop(self, target: Target) -> None:
        """Forget ``target``."""
        self._rows.pop(target, None)


def _expendable(row: _Row) -> bool:
    return not row.proven and Source.SEED not in row.sources
