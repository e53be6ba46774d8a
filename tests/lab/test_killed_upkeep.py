# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at each file that reset and repair-addresses put in place or remove; then once more."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import ROOT
from tests.unit.fake_api import FakeApi
from tests.unit.machine import Server, row, status

CALLS = "rename,renameat,renameat2,rmdir,unlink,unlinkat"
RUN = """
import json, os, sys
from pathlib import Path
from k3sagentd.config import load_config
from k3sagentd.k3s import install
from k3sagentd.k3s.kube import Kube
from k3sagentd.paths import Paths
from k3sagentd.upkeep import repair, repair_steps, reset
from tests.unit.machine import AT
from tests.unit.repairing import Hears
what, root, url, view = sys.argv[1:]
paths = Paths(Path(root))
install.PATH = f"{root}/bin:{install.PATH}"
os.environ["PATH"] = install.PATH
repair.HEARSAY_S = repair_steps.STALE_S = 0.0
repair.Kube = repair_steps.Kube = lambda paths, _="": Kube(paths, url)
config = load_config(paths)
if what == "reset":
    reset.reset(paths, config, print)
else:
    daemon = Hears(paths, json.loads(view))
    found = repair.plan(paths, config, AT, daemon.status())
    if found is not None:
        repair.carry_out(paths, config, found.progress, daemon, print)
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    made = FakeApi(tmp_path / "api")
    yield made
    made.close()


class Machine(Server):
    """A server, in a cluster of three of which it is the one that does not answer."""

    def __init__(self, root: Path, api: FakeApi, what: str, view: dict) -> None:
        super().__init__(root)
        self._what, self._api, self._view = what, api, view
        api.give_certificates(self.paths.k3s_data / "server/tls")
        api.nodes.clear()
        alone = what == "alone"
        api.add_node("n1", server=True, ready=False)
        for name in ("n2", "n3"):
            api.add_node(name, server=True, ready=not alone)

    def run(self, kill_at: int | None = None) -> int:
        """The command; with ``kill_at`` until that call."""
        root = str(self.paths.root)
        command = [sys.executable, "-c", RUN, self._what, root, self._api.url]
        command.append(json.dumps(self._view))
        if kill_at is not None:
            inject = f"inject={CALLS}:signal=KILL:when={kill_at}"
            trace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS}", "-e", inject]
            command = [*trace, *command]
        ours = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command,
            # What a killed process had under way there goes with the test.
            env={**os.environ, **ours, "TMPDIR": str(self.paths.root.parent)},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        self.output = done.stdout + done.stderr
        return done.returncode

    def end(self) -> tuple[object, ...]:
        """All that must be the same however it came about; certificates are made anew each time."""
        files = {
            name: text.partition("::")[2] or text
            for name, text in self.files().items()
            if not name.endswith((".crt", ".key"))
        }
        return files, sorted(self._api.nodes), (self.paths.root / "active").exists()


VIEWS = {
    "reset": status(),
    "rejoin": status(row(2, phase="ready"), row(3, phase="ready")),
    "alone": status(row(2, moved=True), row(3, moved=True)),
}
STEPS: dict[str, Callable[[Machine], bool]] = {
    "reset": lambda m: not m.paths.k3s_data.exists() and not m.paths.left.exists(),
    "rejoin": lambda m: (m.paths.k3s_data / "server/db/etcd.before-repair/name").exists(),
    "alone": lambda m: "k3s server --cluster-reset" in m.said,
}


@pytest.mark.parametrize("what", VIEWS)
def test_a_command_is_killed_at_each_step_and_then_finishes(
    what: str, api: FakeApi, tmp_path: Path
) -> None:
    whole = Machine(tmp_path / "whole", api, what, VIEWS[what])
    assert whole.run() == 0, whole.output
    assert STEPS[what](whole)
    expected = whole.end()
    killed = 0
    while True:
        m = Machine(tmp_path / f"killed-{killed + 1}", api, what, VIEWS[what])
        if m.run(kill_at=killed + 1) == 0:
            break
        killed += 1
        assert m.run() == 0, f"killed at {killed}: {m.output}"
        assert m.end() == expected, f"killed at {killed}: {m.said}"
    assert m.run() == 0, m.output
    assert m.end() == expected, "one run more changed something"
    assert killed >= 8, "the kill did not hit"
