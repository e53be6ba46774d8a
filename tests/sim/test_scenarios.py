# SPDX-License-Identifier: Apache-2.0
"""Each scenario file says what follows from its steps."""

from pathlib import Path

import pytest

from tests.sim.scenario import FILES, play


def test_there_are_scenarios() -> None:
    assert len(FILES) >= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    text = path.read_text()
    assert play(text) == text, "python3 -m tests.sim.scenario --rewrite, and review"
