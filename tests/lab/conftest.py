# SPDX-License-Identifier: Apache-2.0
"""A lab for each test, taken down after it whatever happened; nothing may stay."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k3sagentd.lab import cli, network, site

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--stand-in", "promote_s=2", "--set", "settle=1s")
PROGRAM = [sys.executable, "-m", "k3sagentd"]


class Bench:
    """The lab as a person uses it, by its commands."""

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 240) -> str:
        """``k3sagentd lab …``; its output."""
        done = subprocess.run(
            [*PROGRAM, "lab", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if check:
            assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}{self.logs()}"
        return done.stdout

    def views(self) -> dict[str, dict]:
        """Every machine's own view: ``lab status --json``, without a program for each look."""
        return asyncio.run(cli.views(site.load()))

    def until(
        self, what: Callable[[dict[str, dict]], object], timeout_s: float = 180
    ) -> dict[str, dict]:
        """Wait until the views of the machines that are on satisfy ``what``."""
        deadline = time.monotonic() + timeout_s
        while True:
            views = {n: v for n, v in self.views().items() if "error" not in v}
            try:
                if what(views):
                    return views
            except LookupError:
                pass
            if time.monotonic() > deadline:
                waits = {
                    n: (v["node"]["phase"], v["node"]["waiting_for"]) for n, v in views.items()
                }
                pytest.fail(f"did not happen in {timeout_s} s; {waits}{self.logs()}")
            time.sleep(0.3)

    def node_of(self, node_id: str) -> str:
        """The machine that has ``node_id``."""
        return next(n for n, v in self.views().items() if v.get("node", {}).get("id") == node_id)

    def inside(self, name: str, *command: str) -> str:
        """Run a command in a machine."""
        return self.run("exec", name, "--", *command)

    def logs(self) -> str:
        """The last lines of every machine, for a failure."""
        text = ""
        for log in sorted(site.directory().glob("nodes/*/var/log/*.log")):
            lines = log.read_text(errors="replace").splitlines()[-12:]
            text += f"\n--- {log.parts[-4]} {log.name}\n" + "\n".join(lines)
        return text


@pytest.fixture
def lab() -> Iterator[Bench]:
    """No machines yet; ``lab.run("up", …)`` makes them."""
    assert os.geteuid() == 0, "the lab needs root: run the tests as root"
    site.down()
    yield Bench()
    site.down()
    assert not list(network.NETNS.glob(f"{network.PREFIX}*"))
    assert not site.directory().exists()


def complete(views: dict[str, dict]) -> bool:
    """Every machine that is on is ready in a sealed site."""
    return all(
        v["site"]["phase"] == "sealed" and v["node"]["phase"] == "ready" for v in views.values()
    )


def agreed(views: dict[str, dict]) -> dict[str, object]:
    """What every node must say alike; asserts that it does."""
    keys = ("id", "phase", "epoch", "init_node", "ca_hash")
    seen = [{key: view["site"][key] for key in keys} for view in views.values()]
    assert all(each == seen[0] for each in seen), seen
    return seen[0]
