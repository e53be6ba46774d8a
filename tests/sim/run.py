# SPDX-License-Identifier: Apache-2.0
"""One run from its plan: the storm, the calm after it, and the judgement."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.sim import happenings
from tests.sim.dice import Fault, counted
from tests.sim.ending import judge, patience_s, servers_missing
from tests.sim.plan import Plan
from tests.sim.promise import BrokenError
from tests.sim.world import World

LOOK_S = 30.0
"""How often it is looked whether the site is complete."""


@dataclass(kw_only=True)
class Outcome:
    """What a run came to."""

    plan: Plan
    broken: BrokenError | None = None
    crash: BaseException | None = None
    """An exception in the core itself."""
    outside: str | None = None
    two_clusters: bool = False
    complete: bool = False
    steps: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    inputs: Counter[str] = field(default_factory=Counter)
    states: set[tuple[object, ...]] = field(default_factory=set)
    struck: tuple[tuple[Fault, tuple[int, ...]], ...] = ()
    story: list[str] = field(default_factory=list)

    @property
    def failed(self) -> str | None:
        """The name of what failed, if anything did."""
        if self.broken is not None:
            return self.broken.invariant
        return type(self.crash).__name__ if self.crash is not None else None


def run(plan: Plan, *, told: bool = False) -> Outcome:
    """Run a plan to its end."""
    world = World(plan, told=told)
    happenings.schedule(world)
    outcome = Outcome(plan=plan)
    try:
        _weather(world)
    except BrokenError as error:
        outcome.broken = error
    except Exception as error:  # whatever the core raises is a failure of the run
        outcome.crash = error
    outcome.outside = world.promise.outside
    outcome.two_clusters = len(world.promise.joined) > 1
    outcome.complete = world.complete
    outcome.steps = world.steps
    outcome.struck = tuple(world.dice.struck)
    outcome.faults = world.happened + counted(world.dice.struck)
    outcome.transitions, outcome.inputs = world.transitions, world.inputs
    outcome.states = world.states
    outcome.story = world.story or []
    return outcome


def _weather(world: World) -> None:
    plan = world.plan
    while world.now_s < plan.storm_s:
        world.run(min(plan.storm_s, world.now_s + LOOK_S))
    happenings.heal(world)
    until_s = world.now_s + patience_s(world)
    while world.now_s < until_s:
        world.run(min(until_s, world.now_s + LOOK_S))
        if world.complete and servers_missing(world) is None:
            break
    world.promise.nothing_is_deleted()
    judge(world)
