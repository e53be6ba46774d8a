# SPDX-License-Identifier: Apache-2.0
"""``make planted``: faults that are put into the product on purpose; the simulator must find each.

In the spirit of mutation testing (DeMillo, Lipton and Sayward 1978): a checker that has never been
seen to fail is not known to check. A fault is one or two edits of the source, applied to the code
of a running process and gone with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from tests.sim.plan import Plan, draw, focused
from tests.sim.planted_faults import FAULTS, Edit, Planted
from tests.sim.run import run


def plant(edits: tuple[Edit, ...]) -> None:
    """Edit the functions that run, wherever they were imported to."""
    sources: dict[str, str] = {}
    for edit in edits:
        name = edit.where.partition(":")[0]
        source = sources.get(name) or Path(str(import_module(name).__file__)).read_text()
        assert source.count(edit.old) == 1, f"{edit.where}: {edit.old!r} is not there once"
        sources[name] = source.replace(edit.old, edit.new)
    for edit in edits:
        name, _, path = edit.where.partition(":")
        module = import_module(name)
        # Classes of the edited copy are not used; only a function's code is taken from it.
        copy: dict[str, Any] = {"__name__": f"planted.{name}"}
        sys.modules[f"planted.{name}"] = module
        exec(compile(sources[name], str(module.__file__), "exec"), copy)
        target, edited = _function(vars(module), path), _function(copy, path)
        target.__code__ = edited.__code__


def _function(names: Any, path: str) -> FunctionType:
    first, _, rest = path.partition(".")
    found = names[first]
    if rest:
        found = vars(found)[rest]
        found = found.fget if isinstance(found, property) else found
    assert isinstance(found, FunctionType), path
    return found


def hunt(fault: Planted) -> tuple[Plan | None, str]:
    """Plant a fault in this process and run until it shows: the run, and what it broke."""
    plant(fault.edits)
    first = () if fault.seed is None else (fault.seed,)
    for seed in (*first, *range(fault.runs)):
        plan = focused(seed, fault.focus) if fault.focus else draw(seed)
        outcome = run(plan)
        if outcome.failed:
            return plan, str(outcome.broken or repr(outcome.crash))
    return None, ""


def main() -> int:
    """Exit code 1 where one was not caught."""
    wanted = [fault for fault in FAULTS if len(sys.argv) < 2 or sys.argv[1] in fault.name]
    caught = 0
    # A process for each: what is planted in it dies with it. Not forked, because this process goes
    # on and may hold a lock (that of its output) just when a worker is replaced.
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        for fault, (plan, how) in zip(wanted, pool.imap(hunt, wanted, chunksize=1), strict=True):
            verdict = "NOT CAUGHT"
            if plan is not None:
                verdict = f"seed {plan.seed} of {fault.runs}: {how:.110}"
                if run(plan).failed:  # this process has no fault in it
                    verdict = f"NOT CAUGHT: seed {plan.seed} fails without it as well"
            caught += not verdict.startswith("NOT")
            print(f"{fault.name:62} {verdict}", flush=True)
    print(f"{caught} of {len(wanted)} caught")
    return int(caught != len(wanted))


if __name__ == "__main__":
    sys.exit(main())
