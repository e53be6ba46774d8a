# SPDX-License-Identifier: Apache-2.0
"""Machines that join a site long after its seal: many at once, and at first they see nobody."""

import os
from collections import Counter

import yaml

from k3sagentd.lab import network, site
from tests.lab.cluster import agents, events, files, nodes, said, servers
from tests.lab.conftest import Bench, agreed

KNOBS = ("--stand-in", "promote_s=2", "--stand-in", "request_s=0.5", "--stand-in", "reads=2")
"""Servers that take few requests at a time: a dozen machines are a crowd."""
COUNT = int(os.environ.get("LATE_MACHINES", "12"))
FEWEST_ELSEWHERE = 2
"""Of a dozen that choose among three by lot, fewer choose another once in a hundred thousand."""
ALONE = "1 of 3 machines here, 2 must agree"


def test_a_dozen_join_at_once_and_none_of_them_before(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--wait", "complete", "--set", "settle=30s", *KNOBS)
    before = agreed(lab.views())
    first = list(lab.views())
    machines = site.load()
    late = [machines.add() for _ in range(COUNT)]
    network.partition([first, *([name] for name in late)])
    for name in late:
        machines.start(name)
    # Who hears nobody waits, says so, and touches nothing.
    lab.until(lambda v: all(said(v, name) == ALONE for name in late))
    for name in late:
        assert not list((files(name) / "var/lib/rancher").iterdir())
        assert not list((files(name) / "etc/rancher").iterdir())

    network.heal()
    views = lab.until(lambda v: sorted(agents(v)) == sorted(late), 240)
    assert sorted(servers(views)) == sorted(first)
    assert agreed(views) == before
    lab.until(lambda _: set(nodes(first[0])) == {*first, *late})
    # They are spread over the servers, and whoever came when one was busy came again.
    at = Counter(told(name) for name in late)
    assert set(at) <= {f"https://{views[name]['node']['address']}:6443" for name in first}
    assert max(at.values()) <= COUNT - FEWEST_ELSEWHERE, at
    assert any("429" in (files(name) / "var/log/k3s.log").read_text() for name in late)
    for name in first:
        assert "ready -> joining" not in events(views, name), "a crowd is no reason to be unready"


def told(name: str) -> str:
    """The server that K3s on a machine was told to join."""
    path = files(name) / "etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml"
    server: str = yaml.safe_load(path.read_text())["server"]
    return server
