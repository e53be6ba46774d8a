# SPDX-License-Identifier: Apache-2.0
"""Root in the cluster's API, and the operator's commands, over real daemons and a real etcd."""

import json
import sys
import time

from k3sagentd.core.cluster import Errand, ErrandResult, Roster
from k3sagentd.core.k3s import Outcome
from k3sagentd.core.words import NodeId
from k3sagentd.k3s.errand import read_result, write_errand
from k3sagentd.lab import network, site
from k3sagentd.paths import Paths
from tests.lab.cluster import agents, cluster_id, files, leaves, said, servers
from tests.lab.conftest import FAST, Bench, agreed, complete

STAND_IN = ("--stand-in", "promote_s=2", "--stand-in", "node_grace_s=4")
ALL = (*STAND_IN, "--set", "settle=30s")
"""Who elects waits for all machines: with fewer, fewer of them are servers."""
YES = "--yes"


def k3sagentd(lab: Bench, name: str, *command: str) -> str:
    """A command in a machine; it must succeed."""
    return lab.inside(name, sys.executable, "-m", "k3sagentd", *command)


def errand(lab: Bench, name: str, **fields: object) -> ErrandResult:
    """Give a machine's root an errand as its daemon would, and wait for the answer."""
    paths = Paths(site.load().machine(name))
    node = NodeId(lab.views()[name]["node"]["id"])
    given = Errand(serial=time.monotonic_ns() % 10**9, instance="a" * 16, node=node, **fields)
    write_errand(paths, given)
    deadline = time.monotonic() + 60
    while (result := read_result(paths)) is None or result.errand != given:
        assert time.monotonic() < deadline, f"no answer{lab.logs()}"
        time.sleep(0.1)
    return result


def python(lab: Bench, name: str, code: str) -> str:
    """Run a few lines in a machine."""
    return lab.inside(name, sys.executable, "-c", code)


def members(lab: Bench, name: str) -> list[str]:
    """etcd's own list, asked at one machine."""
    said = python(
        lab,
        name,
        "from urllib.request import urlopen; "
        "print(urlopen('http://127.0.0.1:2379/v3/cluster/member/list', b'{}').read().decode())",
    )
    return sorted(each["peerURLs"][0] for each in json.loads(said)["members"])


def move(name: str, number: int) -> str:
    """Another address, as from a DHCP server that forgot; returns it."""
    namespace, address = network.namespace(name), f"10.77.0.{110 + number}"
    network.run("ip", "-n", namespace, "address", "flush", "dev", "eth0")
    network.run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    network.run("ip", "-n", namespace, "route", "add", "default", "via", network.GATEWAY)
    return address


def ready(views: dict[str, dict], *names: str) -> bool:
    return all(views[name]["node"]["phase"] == "ready" for name in names)


def holding(lab: Bench, name: str, **fields: object) -> ErrandResult:
    """As ``errand``, with the Lease: the daemons of the lab hold it, too, now and then."""
    deadline = time.monotonic() + 60
    version = None
    while True:
        result = errand(lab, name, hold=True, lease_version=version, **fields)
        late = "the Lease has version" in str(result.reason) or "409" in str(result.reason)
        if not late:
            return result
        assert result.view is not None
        assert time.monotonic() < deadline, result.reason
        version = result.view.lease_version


def test_root_keeps_the_lease_and_removes_a_dead_server(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--wait", "complete", *ALL)
    looked = errand(lab, "node1")
    assert looked.outcome is Outcome.DONE, looked.reason
    assert looked.view is not None
    assert [(n.server, n.ready) for n in looked.view.nodes] == [(True, True)] * 3
    ids = tuple(NodeId(view["node"]["id"]) for view in lab.views().values())
    init = NodeId(str(agreed(lab.views())["init_node"]))
    roster = Roster(revision=1, servers=ids, init=init)
    held = holding(lab, "node1", roster=roster)
    assert held.view is not None
    assert (held.view.holder, held.view.roster) == (held.errand.node, roster)
    # Another server is too late with what it saw before.
    late = errand(lab, "node2", hold=True, lease_version=held.errand.lease_version)
    assert late.outcome is Outcome.FAILED
    assert late.view is not None
    assert late.view.roster == roster

    named = {node.name: node for node in looked.view.nodes}
    dead = next(n for n in named if n.startswith("node3"))
    removal = {"remove": dead, "uid": named[dead].uid}
    assert "is ready, not dead" in str(holding(lab, "node1", **removal).reason)
    lab.run("kill", "node3")
    deadline = time.monotonic() + 60
    while (result := holding(lab, "node1", **removal)).outcome is not Outcome.DONE:
        assert time.monotonic() < deadline, result.reason
    assert result.view is not None
    assert sorted(node.name for node in result.view.nodes) == sorted(named.keys() - {dead})
    assert len(members(lab, "node1")) == 2
    # Of two, a dead one cannot be told: the API answers no more.
    lab.run("kill", "node2")
    assert errand(lab, "node1").outcome is Outcome.FAILED


def test_a_server_with_a_new_address_joins_again(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--wait", "complete", *ALL)
    before = agreed(lab.views())
    lab.run("kill", "node3")
    address = move("node3", 3)
    lab.run("start", "node3")
    lab.until(lambda v: v["node3"]["site"]["seen"] == 3 and ready(v, "node1", "node2"))
    lab.until(lambda _: _repaired(lab, "node3"))
    lab.until(lambda v: len(v) == 3 and complete(v))
    assert agreed(lab.views()) == before
    assert f"http://{address}:2380" in members(lab, "node1")
    assert len(members(lab, "node1")) == 3
    assert "nothing to repair" in k3sagentd(lab, "node3", "repair-addresses", YES)


def _repaired(lab: Bench, name: str) -> bool:
    """The command, which refuses until the other servers are seen to be ready and this one dead."""
    command = (sys.executable, "-m", "k3sagentd", "repair-addresses", YES)
    return "K3s starts" in lab.run("exec", name, "--", *command, check=False)


def _moved(views: dict[str, dict], name: str) -> list[str]:
    """The servers that have said so, as heard on ``name``."""
    return [row["name"] for row in views[name]["nodes"] if row["moved"] and row["age_s"] == 0]


def test_the_one_that_moved_waits_for_the_others_that_only_start(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--wait", "complete", *ALL)
    views = lab.views()
    before, cluster = agreed(views), cluster_id("node1")
    for name in views:
        lab.run("kill", name)
        knobs = files(name) / "etc/k3s-standin.yaml"
        knobs.write_text(knobs.read_text() + "start_delay_s: 30\n")
    address = move("node1", 1)
    for name in views:
        lab.run("start", name)
    views = lab.until(lambda v: all(v[name]["site"]["seen"] == 3 for name in views))
    lab.until(lambda v: _moved(v, "node2") == [views["node1"]["node"]["name"]])
    refused = _said(lab, "node1", "repair-addresses", YES)
    assert "Perhaps only starting: node2 (10.77.0.12), node3 (10.77.0.13)" in refused
    lab.until(lambda v: ready(v, "node2", "node3"))
    assert not (files("node1") / "var/lib/k3sagentd-apply/underway.json").exists()
    lab.until(lambda _: _repaired(lab, "node1"))
    views = lab.until(lambda v: len(v) == 3 and complete(v))
    assert agreed(views) == before
    assert {cluster_id(name) for name in views} == {cluster}
    assert f"http://{address}:2380" in members(lab, "node2")
    assert len(members(lab, "node2")) == 3


def test_all_servers_have_new_addresses_after_a_power_cut(lab: Bench) -> None:
    lab.run("up", "--nodes", "4", "--wait", "complete", *ALL)
    views = lab.views()
    before, names, (agent,) = agreed(views), servers(views), agents(views)
    first, cluster = names[0], cluster_id(names[0])
    ids = tuple(NodeId(views[n]["node"]["id"]) for n in names)
    roster = Roster(revision=7, servers=ids, init=NodeId(str(before["init_node"])))
    assert holding(lab, names[1], roster=roster).outcome is Outcome.DONE
    for name in views:
        lab.run("kill", name)
    was = [network.address_of(site.load().machines[name]) for name in names]
    addresses = [move(name, number) for number, name in enumerate(names, 1)]
    lab.run("start", first)
    # One of three: the two others could be the cluster somewhere else.
    lab.until(lambda v: v[first]["site"]["phase"] == "sealed")
    refused = _said(lab, first, "repair-addresses", YES)
    assert "the cluster may be alive without this one. Not heard: 2 of which nothing" in refused
    for name in (*names[1:], agent):
        lab.run("start", name)
    lab.until(lambda v: all(v[name]["site"]["seen"] == 4 for name in views))
    views = lab.until(lambda v: all("etcd knows" in said(v, name) for name in names))
    for name, old, new in zip(names, was, addresses, strict=True):
        assert (
            f"etcd knows this server at {old}, its address is {new} now; give it back, or run "
            "k3sagentd repair-addresses here"
        ) in said(views, name)
    lab.until(lambda v: len(_moved(v, first)) == 3)
    assert "this server is the cluster now" in k3sagentd(lab, first, "repair-addresses", YES)
    lab.until(lambda v: ready(v, first))
    for number, name in enumerate(names[1:], 2):
        lab.until(lambda _, name=name: _repaired(lab, name))
        lab.until(lambda v, up=names[:number]: ready(v, *up))
    views = lab.until(lambda v: len(v) == 4 and complete(v))
    assert agreed(views) == before
    assert members(lab, first) == sorted(f"http://{each}:2380" for each in addresses)
    assert {cluster_id(name) for name in names} == {cluster}
    looked = errand(lab, names[2])
    assert looked.view is not None
    assert looked.view.roster == roster, "what was committed before is there"
    # The agent has followed by itself.
    told = (files(agent) / "etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml").read_text()
    assert any(f"server: https://{each}:6443" in told for each in addresses)
    assert all(node.ready for node in looked.view.nodes)


def test_a_machine_that_is_reset_begins_anew(lab: Bench) -> None:
    lab.run("up", "--nodes", "4", "--wait", "complete", *ALL)
    before = lab.views()
    name = next(n for n, view in before.items() if view["node"]["role"] == "agent")
    machine = site.load().machine(name)
    assert "the daemon runs" in _said(lab, name, "reset", YES)
    python(
        lab,
        name,
        "import os; from k3sagentd.paths import Paths; from k3sagentd.upkeep import service; "
        "os.kill(service.pid(Paths()), 15)",
    )
    lab.until(lambda v: name not in v)
    k3sagentd(lab, name, "reset", YES)
    assert not list((machine / "var/lib/k3sagentd").iterdir())
    assert (machine / "var/lib/rancher/k3s.reset/agent").is_dir()
    lab.run("kill", name)
    lab.run("start", name)
    views = lab.until(lambda v: len(v) == 4 and complete(v))
    assert views[name]["node"]["id"] != before[name]["node"]["id"]
    agreed(views)


def _said(lab: Bench, name: str, *command: str) -> str:
    """What a command that fails says."""
    line = " ".join([sys.executable, "-m", "k3sagentd", *command])
    return lab.run("exec", name, "--", "sh", "-c", f"{line} 2>&1", check=False)


def test_a_server_leaves_and_the_cluster_goes_on(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--wait", "complete", *ALL)
    leaves(lab, "node3")
    assert (site.load().machine("node3") / "etc/k3sagentd/left").exists()
    assert "http://10.77.0.13:2380" not in members(lab, "node1"), lab.logs()
    views = lab.until(lambda v: "node3" not in v and ready(v, "node1", "node2"))
    left = servers(views)
    assert len(members(lab, left[0])) == len(left), lab.logs()
    looked = errand(lab, left[0])
    assert looked.view is not None
    assert not [node for node in looked.view.nodes if node.name.startswith("node3")]
    # It stays away over a power cut, and says why.
    lab.run("kill", "node3")
    lab.run("start", "node3")
    assert "has left its site" in _said(lab, "node3", "status")


def test_the_only_server_does_not_leave(lab: Bench) -> None:
    lab.run("up", "--nodes", "1", "--wait", "complete", *FAST)
    assert "the cluster would end with it" in _said(lab, "node1", "leave", YES)
    assert complete(lab.views())
