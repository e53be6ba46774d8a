# SPDX-License-Identifier: Apache-2.0
"""The power of every machine is cut at a random moment of the bootstrap: always one cluster."""

import os
import random
import time

import pytest

from tests.fleet.conftest import RELEASES, Fleet

SEED = int(os.environ.get("FLEET_SEED") or random.randrange(10**6))
"""Decides who is cut when; the run itself is as it happens."""
BOOTSTRAP_S = 17.0
"""About as long as it takes when nobody cuts anything."""


@pytest.fixture(scope="module")
def site(fleet: Fleet) -> Fleet:
    """Five machines without power."""
    for number in range(5):
        fleet.configure(fleet.add(RELEASES[number % len(RELEASES)]))
    return fleet


def test_each_in_turn(site: Fleet) -> None:
    dice = random.Random(SEED)
    print(f"\nFLEET_SEED={SEED}")
    for machine in site.machines:
        machine.on()
    start_s = time.monotonic()
    moments = sorted(dice.uniform(2.0, BOOTSTRAP_S) for _ in site.machines)
    for at_s, machine in zip(moments, dice.sample(site.machines, 5), strict=True):
        time.sleep(max(0.0, start_s + at_s - time.monotonic()))
        phase = site.views().get(machine.name, {}).get("node", {}).get("phase", "no answer")
        machine.cut()
        print(f"  {time.monotonic() - start_s:5.1f} s  {machine.name} cut: {phase}")
        time.sleep(dice.uniform(0.0, 2.0))
        machine.on()
    views = site.complete()
    print(f"  {time.monotonic() - start_s:5.1f} s  complete")

    for key in ("id", "epoch", "init_node", "ca_hash"):
        assert len({str(view["site"][key]) for view in views.values()}) == 1, key
    servers = [m for m in site.machines if views[m.name]["node"]["role"] == "server"]
    assert len(servers) == 3
    get = ("k3s", "kubectl", "get", "nodes", "-o", "name")
    for server in servers:
        site.until(lambda _, s=server: len(s.run(*get, check=False).split()) == 5)
    hashes = {
        server.run("sha256sum", "/var/lib/rancher/k3s/server/tls/server-ca.crt").split()[0]
        for server in servers
    }
    assert hashes == {views["m1"]["site"]["ca_hash"]}
    # One epoch and one cluster: nothing was begun that had to be given up.
    assert views["m1"]["site"]["epoch"] == 0
    for machine in site.machines:
        assert "abandoned" not in machine.run("ls", "/var/lib/rancher")
        machine.assert_healthy()
        machine.assert_starts_at_boot(views[machine.name]["node"]["role"])
