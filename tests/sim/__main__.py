# SPDX-License-Identifier: Apache-2.0
"""``make sim``: many runs on all cores, what they exercised, and the first failure made small."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.pool import AsyncResult, Pool

from tests.sim import coverage
from tests.sim.dice import Fault
from tests.sim.plan import calm, draw
from tests.sim.run import run
from tests.sim.shrink import Shrinker, timeline

BATCH = 50
"""Seeds that a worker takes at a time."""
BENCHED = 200
"""Bootstraps of five machines that give the figure."""


@dataclass
class Tally:
    """What some runs came to."""

    runs: int = 0
    steps: int = 0
    complete: int = 0
    outside: int = 0
    two_clusters: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    faults: Counter[Fault] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    inputs: Counter[str] = field(default_factory=Counter)
    states: set[tuple[object, ...]] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        """Take in what another worker did."""
        self.runs += other.runs
        self.steps += other.steps
        self.complete += other.complete
        self.outside += other.outside
        self.two_clusters += other.two_clusters
        self.failed |= other.failed
        self.faults += other.faults
        self.transitions += other.transitions
        self.inputs += other.inputs
        self.states |= other.states


def batch(seeds: range) -> Tally:
    """Run some seeds."""
    gc.disable()
    tally = Tally()
    for seed in seeds:
        outcome = run(draw(seed))
        tally.runs += 1
        tally.steps += outcome.steps
        tally.complete += outcome.complete
        tally.outside += outcome.outside is not None
        tally.two_clusters += outcome.two_clusters
        tally.faults += outcome.faults
        tally.transitions += outcome.transitions
        tally.inputs += outcome.inputs
        tally.states |= outcome.states
        if outcome.failed:
            tally.failed[seed] = outcome.failed
    gc.collect()
    return tally


def _hand_out(pool: Pool, start: int, end: int) -> AsyncResult[Tally]:
    return pool.apply_async(batch, (range(start, min(start + BATCH, end)),))


def campaign(first: int, runs: int, seconds: float, cores: int) -> Tally:
    """Run seeds from ``first`` on until there are ``runs`` or the time is up."""
    end = time.monotonic() + seconds

    starts = iter(range(first, first + runs, BATCH))
    tally = Tally()
    with multiprocessing.Pool(cores) as pool:
        # A batch is handed out when one comes back, so that the time is kept.
        waiting = [_hand_out(pool, start, first + runs) for start in islice(starts, 2 * cores)]
        while waiting and not tally.failed:
            tally.add(waiting.pop(0).get())
            if time.monotonic() < end:
                waiting += [_hand_out(pool, start, first + runs) for start in islice(starts, 1)]
    return tally


def bootstraps_per_second() -> float:
    """Calm bootstraps of five machines per second on one core, all invariants on."""
    gc.disable()
    began = time.perf_counter()
    for seed in range(BENCHED):
        outcome = run(calm(5, seed))
        assert outcome.failed is None, f"calm run {seed}"
    return BENCHED / (time.perf_counter() - began)


def report(tally: Tally, took_s: float, cores: int) -> None:
    """Print what was exercised."""
    print("faults injected:")
    for fault in Fault:
        print(f"  {tally.faults[fault]:9,} {fault}")
    print("transitions taken:")
    for name, short in coverage.transitions().items():
        beyond = coverage.BEYOND_REACH.get(short)
        print(
            f"  {tally.transitions[name]:9,} {name}{f' (beyond reach: {beyond})' if beyond else ''}"
        )
    print("fed to the core:")
    for kind in sorted(coverage.inputs()):
        print(f"  {tally.inputs[kind]:9,} {kind}")
    print(
        f"{tally.runs:,} runs, {tally.steps:,} events, {len(tally.states):,} kinds of node states; "
        f"{tally.complete:,} sites complete; {tally.outside:,} runs outside the assumptions, "
        f"{tally.two_clusters:,} of them with two clusters"
    )
    print(
        f"{tally.runs / took_s:.0f} runs and {tally.steps / took_s:,.0f} events per second on "
        f"{cores} cores"
    )


def main() -> int:
    """Exit code 1 where a run failed or something was never exercised."""
    parser = argparse.ArgumentParser(prog="make sim")
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, help="this run alone, with its timeline")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        outcome = run(draw(arguments.seed))
        print("\n".join(timeline(outcome)))
        return int(outcome.failed is not None)
    cores = len(os.sched_getaffinity(0))
    began = time.monotonic()
    tally = campaign(arguments.first, arguments.runs, arguments.seconds, cores)
    report(tally, time.monotonic() - began, cores)
    print(f"{bootstraps_per_second():.0f} bootstraps of 5 machines per second and core")
    if tally.failed:
        seed = min(tally.failed)
        print(f"\nseed {seed} fails: {tally.failed[seed]}; the smallest run that fails alike:\n")
        print("\n".join(timeline(Shrinker(run(draw(seed))).shrink())))
        return 1
    wanting = list(
        coverage.gaps(
            tally.transitions,
            tally.inputs,
            tally.faults,
            all_of_it=tally.runs >= coverage.RUNS_FOR_ALL,
        )
    )
    print("\n".join(wanting) or f"{tally.runs:,} of {tally.runs:,} runs kept the promise")
    return int(bool(wanting))


if __name__ == "__main__":
    sys.exit(main())
