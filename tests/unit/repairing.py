# SPDX-License-Identifier: Apache-2.0
"""``k3sagentd repair-addresses``, carried out beside a daemon that hears what it is told."""

import yaml

from k3sagentd.config import load_config
from k3sagentd.k3s import facts
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import repair
from tests.unit.machine import AT, Server, row, status

READY2 = row(2, phase="ready")
MOVED2, MOVED3 = row(2, moved=True), row(3, moved=True)
ALL_MOVED = status(MOVED2, MOVED3)


class Hears:
    """The daemon: what it hears at each look, the last for ever, and what it was told to say."""

    def __init__(self, paths: Paths, *views: dict) -> None:
        self.paths, self._views = paths, list(views) or [ALL_MOVED]
        self.known: list[str | None] = []
        """By which address etcd knows this machine, as root said each time."""

    def status(self) -> dict:
        return self._views.pop(0) if len(self._views) > 1 else self._views[0]

    def reread(self) -> None:
        found = facts.read_facts(self.paths)
        assert found is not None
        self.known.append(found.facts.node_ip)


def planned(server: Server, view: dict) -> Progress:
    found = repair.plan(server.paths, load_config(server.paths), AT, view)
    assert found is not None
    return found.progress


def carry_out(server: Server, progress: Progress, daemon: Hears | None = None) -> list[str]:
    steps: list[str] = []
    config = load_config(server.paths)
    repair.carry_out(server.paths, config, progress, daemon or Hears(server.paths), steps.append)
    assert not server.paths.underway.exists()
    return steps


def told(server: Server) -> dict:
    return yaml.safe_load(server.paths.dropin.read_text())
