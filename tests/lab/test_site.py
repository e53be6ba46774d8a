# SPDX-License-Identifier: Apache-2.0
"""Whole sites: real daemons, mDNS, TLS and etcd, real power cuts and cut wires."""

import json
import secrets
import subprocess

from k3sagentd.lab import network, site
from tests.lab.conftest import FAST, PROGRAM, ROOT, Bench, agreed, complete

ETCDCTL = ("env", "ETCDCTL_API=3", "etcdctl", "-w", "json")


def members(lab: Bench, name: str) -> dict:
    return json.loads(lab.inside(name, *ETCDCTL, "member", "list"))


def test_one_command_makes_a_site_and_leaves_nothing(lab: Bench) -> None:
    done = subprocess.run(
        [*PROGRAM, "lab", "--nodes", "5", "--wait", "complete", "--json", *FAST],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    assert answer["timings_s"].keys() == {"visible", "nominated", "sealed", "complete"}
    assert answer["site"]["phase"] == "sealed"
    assert sorted(node["role"] for node in answer["nodes"]) == ["agent"] * 2 + ["server"] * 3
    assert not site.directory().exists()
    assert not list(network.NETNS.glob(f"{network.PREFIX}*"))


def test_five_machines_become_one_cluster_and_others_come_later(lab: Bench) -> None:
    lab.run("up", "--nodes", "5", "--wait", "complete", *FAST, "--same-hostname", "raspberrypi")
    views = lab.views()
    site_view = agreed(views)
    servers = [n for n, v in views.items() if v["node"]["role"] == "server"]
    assert len(servers) == 3
    lists = [members(lab, name) for name in servers]
    assert len({each["header"]["cluster_id"] for each in lists}) == 1
    for each in lists:
        assert [m.get("isLearner", False) for m in each["members"]] == [False] * 3
        assert all(m["name"] for m in each["members"]), "a member was never started"
    nodes = lab.inside(servers[0], "k3s", "kubectl", "get", "nodes").splitlines()[1:]
    assert len({line.split()[0] for line in nodes}) == 5, nodes

    # The init node follows the others now: its cluster-init is not left behind.
    init = lab.node_of(str(site_view["init_node"]))
    lab.until(lambda v: "cluster-init" not in dropin(init))
    assert "server: https://" in dropin(init)

    # A sixth machine, from whichever node answers, also while the init node is off.
    lab.run("kill", init)
    assert "node6" in lab.run("add")
    sixth = lab.until(lambda v: v["node6"]["node"]["phase"] == "ready")["node6"]
    assert sixth["node"]["role"] == "agent"
    assert sixth["site"]["ca_hash"] == site_view["ca_hash"]

    # A machine with another token, on the same wire, ignores and is ignored.
    stranger = site.load()
    name = stranger.add(token=secrets.token_hex(32))
    stranger.start(name)
    lab.until(lambda v: v[name]["node"]["phase"] == "discovering")
    lab.run("start", init)
    views = lab.until(
        lambda v: (
            v[init]["node"]["phase"] == "ready"
            and all(x["site"]["seen"] == 6 for n, x in v.items() if n != name)
        )
    )
    assert views[name]["site"]["seen"] == 1
    assert members(lab, init)["header"]["cluster_id"] == lists[0]["header"]["cluster_id"]


def dropin(name: str) -> str:
    machine = site.load().machine(name)
    return (machine / "etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml").read_text()


def nominated_but_not_sealed(lab: Bench, *more: str) -> str:
    """A site whose init node was chosen and is starting K3s; returns its name."""
    slow = ("--stand-in", "start_delay_s=3600")
    lab.run("up", "--nodes", "5", "--wait", "nominated", *FAST, *slow, *more)
    views = lab.views()
    assert {v["site"]["phase"] for v in views.values()} == {"nominated"}
    return lab.node_of(str(agreed(views)["init_node"]))


def cut(lab: Bench, init: str) -> None:
    """Its power; whoever starts K3s from here on is not slow any more."""
    lab.run("kill", init)
    for name in site.load().machines:
        (site.load().machine(name) / "etc/k3s-standin.yaml").write_text("promote_s: 2\n")


def test_the_init_node_loses_power_before_the_seal_and_goes_on(lab: Bench) -> None:
    init = nominated_but_not_sealed(lab)
    cut(lab, init)
    lab.run("start", init)
    views = lab.until(lambda v: len(v) == 5 and complete(v), 150)
    found = agreed(views)
    assert found["epoch"] == 0
    assert found["init_node"] == views[init]["node"]["id"]


def test_the_init_node_never_comes_back_in_time(lab: Bench) -> None:
    init = nominated_but_not_sealed(lab, "--set", "abandon-after=30s")
    data = site.load().machine(init) / "var/lib/rancher"
    lab.until(lambda v: (data / "k3s/k3sagentd.json").exists())
    cut(lab, init)
    others = lab.until(
        lambda v: len(v) == 4 and all(x["site"]["phase"] == "sealed" for x in v.values())
    )
    assert agreed(others)["epoch"] >= 1
    lab.run("start", init)
    views = lab.until(lambda v: len(v) == 5 and complete(v), 180)
    agreed(views)
    assert list(data.glob("k3s.abandoned-*")), "its data was not moved aside"


def test_a_majority_elects_and_a_minority_waits(lab: Bench) -> None:
    cut = "node1,node2 / node3,node4,node5"
    lab.run("up", "--nodes", "5", *FAST, "--partition", cut)
    waits = "2 of 5 machines here, 3 must agree"
    views = lab.until(
        lambda v: (
            all(v[n]["site"]["phase"] == "sealed" for n in ("node3", "node4"))
            and all(v[n]["node"]["waiting_for"] == waits for n in ("node1", "node2"))
        )
    )
    for name in ("node1", "node2"):
        assert views[name]["site"]["phase"] == "discovering"
        assert not (site.load().machine(name) / "var/lib/rancher/k3s").exists()
    lab.run("heal")
    agreed(lab.until(lambda v: len(v) == 5 and complete(v), 150))


def test_two_halves_of_four_start_nothing(lab: Bench) -> None:
    lab.run("up", "--nodes", "4", *FAST, "--partition", "node1,node2 / node3,node4")
    lab.until(lambda v: len(v) == 4 and all(x["site"]["seen"] == 2 for x in v.values()))
    # Longer than settle and every stagger: whoever wanted to would have.
    lab.inside("node1", "sleep", "8")
    for view in lab.views().values():
        assert view["site"]["phase"] == "discovering"
        assert view["node"]["waiting_for"] == "2 of 4 machines here, 3 must agree"
    assert not list(site.directory().glob("nodes/*/var/lib/rancher/k3s"))
