# SPDX-License-Identifier: Apache-2.0
"""Runs by their seeds: some of the many of ``make sim``, and those that once failed."""

import multiprocessing
import os
from importlib import import_module
from pathlib import Path

import pytest

from tests.sim import coverage
from tests.sim.dice import Dice, Fault
from tests.sim.plan import Plan, calm, draw
from tests.sim.planted_faults import FAULTS
from tests.sim.run import run
from tests.sim.shrink import Shrinker, timeline

RUNS = 200
FOUND = {
    4130: "the answer to an order of an earlier run of the daemon, word for word the same, counted",
    7620: "a line was taken for untrue because the first pattern that it met did not hold",
    21541: "an init node that wanted to abandon did not say that too few could vote",
    50501: "a node that waits for the machine with the cluster did not say so",
    53528: "clones were counted as more machines than nodes",
    74931: "acceptors refused a value that was accepted already, for good",
    23354: "the best machine was slow to promise; a hopeless one was nominated without a pause",
    30293: "a line was taken for untrue because the sealed cluster itself was gone",
    32493: "a line was taken for untrue because apply had died with the order",
    1731: "a server that was about to join again did not stop when it was to be an agent",
    2437: "a server that never got ready kept the others from joining",
    2550: "what a probe showed of a first server was taken for a cluster from before",
    2877: "a start was forced while an abandoned one was put aside",
    3195: "an agent by the roster was a server, and stayed in etcd",
    4399: "a server was told to join while root put its data aside",
    8577: "an agent that was only told of other servers was not fit to be one, for an hour",
    7035: "a clone took another name and joined beside its twin",
    4811: "the one server too many was one from before, which is not ours to demote",
    4427: "the Node of an adopted server that was gone for good stayed",
    13628: "a dead server and one that was to come in waited for each other",
    17006: "a clone took the nomination of its twin for its own",
    25620: "a server of another cluster counted as one of the site's",
    29934: "an adopted init node that etcd had removed founded another cluster",
    201202: "an order that was due again, and waited for a registration, said «in 0 s» for good",
    86273: "a machine with a cluster and a slow disk: others were nominated and gave up, 500 times",
}
"""What each seed showed; those before them are in ``test_promise``, as the plans they were."""


def outcome_of(seed: int) -> tuple[int, str | None]:
    return seed, run(draw(seed)).failed


def story(seed: int) -> str:
    return "\n".join(timeline(Shrinker(run(draw(seed))).shrink()))


def test_seeds() -> None:
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        failed = [seed for seed, why in pool.imap(outcome_of, range(RUNS), 20) if why]
    assert not failed, story(failed[0])


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found(seed: int) -> None:
    assert run(draw(seed)).failed is None, story(seed)


def test_a_seed_is_a_run_to_the_event() -> None:
    for seed in range(20):
        once, again = run(draw(seed), told=True), run(draw(seed), told=True)
        assert once.story == again.story
        assert once.steps == again.steps


def test_the_faults_that_struck_are_the_run() -> None:
    """Drawn, or given as a list: the same faults make the same run."""
    for seed in range(100, 140):
        drawn = run(draw(seed), told=True)
        given = Plan(**{**draw(seed).__dict__, "only": frozenset(drawn.struck)})
        assert run(given, told=True).story == drawn.story


def test_a_failing_run_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from k3sagentd.core import paxos

    monkeypatch.setattr(paxos, "constrained", lambda promises: None)
    runs = (run(draw(seed)) for seed in range(500))
    before = next(each for each in runs if each.failed and each.struck and each.plan.happenings)
    after = Shrinker(before).shrink()
    assert after.failed == before.failed
    assert len(after.struck) * 2 < len(before.struck)
    assert len(after.plan.happenings) < len(before.plan.happenings)
    assert len(after.plan.machines) <= len(before.plan.machines)
    assert "BROKEN: one value is chosen per entry" in "\n".join(timeline(after))


def test_what_is_planted_is_still_there_to_be_planted() -> None:
    for fault in FAULTS:
        for edit in fault.edits:
            source = Path(str(import_module(edit.where.partition(":")[0]).__file__)).read_text()
            assert source.count(edit.old) == 1, f"{fault.name}: {edit.old}"


def test_the_dice_are_fair() -> None:
    dice = Dice(7)
    draws = [dice.uniform(a, b) for a in range(100) for b in range(100)]
    for tenth in range(10):
        share = sum(tenth <= 10 * each < tenth + 1 for each in draws) / len(draws)
        assert 0.085 < share < 0.115
    hits = sum(dice.strikes(Fault.LOSS, 0.2, 1, n) for n in range(10_000))
    assert 1800 < hits < 2200


def test_every_transition_has_a_name_of_its_own() -> None:
    names = coverage.transitions()
    assert set(coverage.BEYOND_REACH) <= set(names.values())
    outcome = run(calm(5))
    assert set(outcome.transitions) <= set(names)
    assert set(outcome.inputs) <= coverage.inputs()
