# SPDX-License-Identifier: Apache-2.0
"""The exhaustive search: clean within a small bound, and able to find bugs. ``make exhaustive``
goes further."""

import multiprocessing

import pytest

from tests.sim.exhaustive import Bound, BrokenError, search
from tests.sim.planted import plant
from tests.sim.planted_faults import FAULTS, Edit

ONE_BALLOT = Bound(decrees=1, ballots=1, crashes=1)
TWO_BALLOTS = Bound(decrees=1, ballots=2, crashes=0)
OTHER_BALLOTS = Edit(
    where="k3sagentd.core.election:_ours",
    old="return message.decree == proposal.decree and message.ballot == proposal.ballot",
    new="return message.decree == proposal.decree",
)
LOWEST_BALLOT = Edit(where="k3sagentd.core.paxos:constrained", old="return max(", new="return min(")


def test_every_run_with_one_ballot_each_and_a_crash_anywhere() -> None:
    assert "4,940 distinct states" in search(ONE_BALLOT)


def hunt(edits: tuple[Edit, ...], bound: Bound) -> str | None:
    plant(edits)
    try:
        search(bound)
    except BrokenError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("edits", "bound"),
    [
        *(
            pytest.param(fault.edits, ONE_BALLOT, id=fault.name)
            for fault in FAULTS
            if fault.name
            in (
                "ignores an accepted value",
                "does not tell what it accepted",
                "accepts below its promise",
                "the own vote is not persisted",
                "a quorum is one too small",
            )
        ),
        pytest.param((LOWEST_BALLOT,), TWO_BALLOTS, id="takes the value of the lowest ballot"),
        pytest.param((OTHER_BALLOTS,), TWO_BALLOTS, id="counts votes of its other ballots"),
    ],
)
def test_it_finds(edits: tuple[Edit, ...], bound: Bound) -> None:
    with multiprocessing.Pool(1) as pool:  # what is planted dies with the process
        assert pool.apply(hunt, (edits, bound)), "not found"
