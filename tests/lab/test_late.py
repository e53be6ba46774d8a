# SPDX-License-Identifier: Apache-2.0
"""Machines that join a site long after its seal: many at once, and one that sees nobody."""

from collections import Counter

import yaml

from k3sagentd.lab import network, site
from tests.lab.cluster import CARD, agents, events, files, nodes, said, servers
from tests.lab.conftest import Bench, agreed

KNOBS = ("--stand-in", "promote_s=2", "--stand-in", "request_s=0.2", "--stand-in", "reads=2")
"""Servers that take few requests at a time: a dozen machines are a crowd."""
COUNT = 12
FEWEST_ELSEWHERE = 2
"""Of a dozen that choose among three by lot, fewer choose another once in a million times."""


def test_many_join_at_once_and_one_is_alone(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--wait", "complete", "--set", "settle=30s", *KNOBS)
    before = agreed(lab.views())
    first = list(lab.views())
    machines = site.load()
    lonely, *late = [machines.add() for _ in range(COUNT + 1)]
    network.partition([[*first, *late], [lonely]])
    for name in (lonely, *late):
        machines.start(name)
    views = lab.until(lambda v: len(agents(v)) == COUNT)
    assert sorted(servers(views)) == sorted(first)
    assert agreed({name: view for name, view in views.items() if name != lonely}) == before
    assert set(nodes(first[0])) == {*first, *late}

    # They are spread over the servers, and whoever came when one was busy came again.
    at = Counter(told(name) for name in late)
    assert set(at) <= {f"https://{views[name]['node']['address']}:6443" for name in first}
    assert max(at.values()) <= COUNT - FEWEST_ELSEWHERE, at
    assert any("429" in (files(name) / "var/log/k3s.log").read_text() for name in late)
    for name in first:
        assert "ready -> joining" not in events(views, name), "a crowd is no reason to be unready"

    # None of them has called an election, and the one that hears nobody does nothing alone.
    for name in views:
        assert views[name]["site"]["epoch"] == 0
        assert name in first or "electing" not in events(views, name)
    assert said(views, lonely) == "1 of 3 machines here, 2 must agree"
    for directory in CARD:
        if directory != "var/lib/k3sagentd":
            assert not list((files(lonely) / directory).rglob("*.yaml")), directory
    assert not list((files(lonely) / "var/lib/rancher").iterdir())
    lab.run("heal")
    agreed(lab.until(lambda v: lonely in agents(v)))


def told(name: str) -> str:
    """The server that K3s on a machine was told to join."""
    path = files(name) / "etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml"
    server: str = yaml.safe_load(path.read_text())["server"]
    return server
