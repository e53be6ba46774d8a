# SPDX-License-Identifier: Apache-2.0
"""The table of phases: complete, and the same in the docs."""

from pathlib import Path

from k3sagentd.core.lifecycle import TABLE
from k3sagentd.core.words import NodePhase
from tests.lifecycle_doc import render


def test_the_docs_show_the_table_as_it_is() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/lifecycle.md"
    assert page.read_text() == render(), "stale: make docs"


def test_every_phase_can_be_left_and_reached() -> None:
    left = {phase for rule in TABLE for phase in rule.phases}
    reached = {rule.next for rule in TABLE}
    # Unconfigured is a daemon that does not start: exit 78.
    assert left == reached == set(NodePhase) - {NodePhase.UNCONFIGURED}
