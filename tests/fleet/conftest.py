# SPDX-License-Identifier: Apache-2.0
"""Bases once a run, a fleet for each module; nothing may stay, also where a test failed."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from k3sagentd import site_token
from k3sagentd.lab import network, site
from tests.fleet import base
from tests.fleet.machine import FLEET, Machine, take_down

RELEASES = tuple(os.environ.get("FLEET_RELEASES", "bookworm,trixie").split(","))
CONFIG = {
    "nodes": 5,
    "settle": "1s",
    "install": {"script": "https://site.fleet/install.sh"},
    # Machines in namespaces have the cgroup controllers that their host left them.
    "ignore-preflight": ["cgroup"],
}


@dataclass
class Fleet:
    """Machines of one site."""

    bases: dict[str, base.Base]
    token: str = field(default_factory=site_token.generate)
    machines: list[Machine] = field(default_factory=list)

    def add(self, release: str, *, baked: bool = True) -> Machine:
        """One more machine, without power and without configuration."""
        number = len(self.machines) + 1
        layers = self.bases[release].baked if baked else self.bases[release].plain
        machine = Machine(f"m{number}", number, layers)
        self.machines.append(machine)
        return machine

    def configure(self, machine: Machine, **other: Any) -> None:
        """As by hand: /etc/k3sagentd."""
        put = machine.put if machine.process is None else machine.put_now
        put("etc/k3sagentd/config.yaml", yaml.safe_dump(CONFIG | other))
        put("etc/k3sagentd/token", self.token + "\n", 0o600)

    def views(self) -> dict[str, dict[str, Any]]:
        """What each machine says; those that do not answer are left out."""

        async def ask() -> list[dict[str, Any] | None]:
            return await asyncio.gather(*(each.view() for each in self.machines))

        found = asyncio.run(ask())
        pairs = zip(self.machines, found, strict=True)
        return {machine.name: view for machine, view in pairs if view is not None}

    def until(
        self,
        what: Callable[[dict[str, dict[str, Any]]], object],
        timeout_s: float = 180,
    ) -> dict[str, dict[str, Any]]:
        """Wait until what the machines say satisfies ``what``."""
        deadline = time.monotonic() + timeout_s
        while True:
            views = self.views()
            if what(views):
                return views
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {timeout_s:.0f} s:\n{self.story(views)}")
            time.sleep(0.3)

    def complete(self, count: int = 5) -> dict[str, dict[str, Any]]:
        """Wait until ``count`` machines are ready in one sealed site."""

        def ready(views: dict[str, dict[str, Any]]) -> bool:
            return len(views) == count and all(
                view["site"]["phase"] == "sealed" and view["node"]["phase"] == "ready"
                for view in views.values()
            )

        return self.until(ready)

    def story(self, views: dict[str, dict[str, Any]]) -> str:
        """Where everything stands, for a failure."""
        text = ""
        for machine in self.machines:
            view = views.get(machine.name)
            told = ("phase", "waiting_for", "notes")
            said = [view["node"][key] for key in told] if view else "no answer"
            text += f"--- {machine.name}: {said}\n"
            if machine.leader() is not None:
                # Apart: K3s, which says the same each second, would leave no line for the others.
                journal = ("journalctl", "-b", "--no-pager", "-o", "short-monotonic")
                text += machine.run(*journal, "-n", "30", "-u", "k3sagentd*", check=False)
                text += machine.run(
                    *journal, "-n", "5", "-u", "k3s", "-u", "k3s-agent", check=False
                )
            else:
                text += machine.console()
        return text


@pytest.fixture(scope="session")
def bases() -> Iterator[dict[str, base.Base]]:
    """The packages, and a Debian of each release."""
    assert os.geteuid() == 0, "machines are booted by root: run the tests as root"
    site.down()
    take_down([])
    start_s = time.monotonic()
    try:
        made = base.make(RELEASES)
        print(f"\npackages and bases of {', '.join(RELEASES)}: {time.monotonic() - start_s:.0f} s")
        yield made
    finally:
        base.remove()


@pytest.fixture(scope="module")
def fleet(bases: dict[str, base.Base]) -> Iterator[Fleet]:
    """A wire with the site's web on it, and no machine yet."""
    network.make_switch()
    command = [sys.executable, "-m", "tests.fleet.serve", str(FLEET)]
    web = subprocess.Popen(["ip", "netns", "exec", network.SWITCH, *command], cwd=base.ROOT)
    made = Fleet(bases)
    try:
        yield made
    finally:
        web.kill()
        web.wait()
        take_down(made.machines)
        assert not list(network.NETNS.glob(f"{network.PREFIX}*"))
