# SPDX-License-Identifier: Apache-2.0
"""Makes a failing run small: the fewest machines, happenings and strikes that still fail.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002): leave out
halves, then quarters, down to single ones, as long as the same invariant breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.sim.plan import MachinePlan, Plan
from tests.sim.run import Outcome, run

T = TypeVar("T")
RUNS_LIMIT = 600
"""Runs that one failure is worth."""


class Shrinker:
    """Looks for a smaller plan that fails alike."""

    def __init__(self, outcome: Outcome) -> None:
        self.best = outcome
        self._wanted = outcome.failed
        self._left = RUNS_LIMIT

    def _try(self, plan: Plan) -> bool:
        if self._left <= 0:
            return False
        self._left -= 1
        outcome = run(plan)
        if outcome.failed != self._wanted:
            return False
        self.best = outcome
        return True

    def shrink(self) -> Outcome:
        """The smallest failing run that was found."""
        struck = frozenset(self.best.struck)
        self._try(replace(self.best.plan, only=struck))
        before = -1
        while before != self._left and self._left > 0:
            before = self._left
            self._machines()
            self._list(
                self.best.plan.happenings,
                lambda kept: replace(self.best.plan, happenings=tuple(kept)),
            )
            self._list(
                sorted(self.best.plan.only or ()),
                lambda kept: replace(self.best.plan, only=frozenset(kept)),
            )
            if self._left == before or not self._simpler():
                break
        return self.best

    def _list(self, items: Sequence[T], plan_of: Callable[[list[T]], Plan]) -> None:
        """Leave out as many of ``items`` as can be."""
        kept = list(items)
        size = len(kept)
        while size >= 1 and kept:
            start = 0
            while start < len(kept):
                fewer = kept[:start] + kept[start + size :]
                if self._try(plan_of(fewer)):
                    kept = fewer
                else:
                    start += size
            size //= 2

    def _machines(self) -> None:
        """A smaller site, the last machine first."""
        while len(self.best.plan.machines) > 1:
            plan = self.best.plan
            nodes = plan.machines[0].nodes
            fewer = plan.machines[:-1]
            smaller = tuple(replace(m, nodes=nodes - 1) if m.nodes == nodes else m for m in fewer)
            if not any(self._try(replace(plan, machines=each)) for each in (smaller, fewer)):
                break

    def _simpler(self) -> bool:
        """Machines without peculiarities; happenings without length."""
        before = self.best
        for number, m in enumerate(self.best.plan.machines):
            plain = MachinePlan(nodes=m.nodes, servers=m.servers, boot_s=m.boot_s)
            if m != plain:
                machines = list(self.best.plan.machines)
                machines[number] = plain
                self._try(replace(self.best.plan, machines=tuple(machines)))
        for number, happening in enumerate(self.best.plan.happenings):
            if happening.for_s > 1:
                happenings = list(self.best.plan.happenings)
                happenings[number] = replace(happening, for_s=1.0)
                self._try(replace(self.best.plan, happenings=tuple(happenings)))
        return self.best is not before


def timeline(outcome: Outcome, lines_limit: int = 400) -> Iterator[str]:
    """The run as people read it: what it was made of, what happened, what broke."""
    again = run(outcome.plan, told=True)
    yield outcome.plan.describe()
    yield ""
    story = again.story
    if len(story) > lines_limit:
        yield f"({len(story) - lines_limit} lines before)"
        story = story[-lines_limit:]
    yield from story
    yield ""
    yield f"BROKEN: {again.broken or repr(again.crash)}"
