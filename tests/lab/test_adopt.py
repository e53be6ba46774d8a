# SPDX-License-Identifier: Apache-2.0
"""K3s was there first: its clusters are taken over as they are, or left alone."""

import json
import sqlite3
import sys
import time
from pathlib import Path

import yaml

from k3sagentd.lab import network, site
from tests.lab.conftest import FAST, Bench, agreed, complete
from tests.lab.test_site import ETCDCTL, members

SUPERVISE = (
    "from pathlib import Path; from k3sagentd.k3s import supervise; "
    "from k3sagentd.core.k3s import ServerOrAgent; from k3sagentd.paths import Paths; "
    "supervise.start(Paths(), Path('/usr/local/bin/k3s'), ServerOrAgent.SERVER)"
)
DETACH = "setsid k3s server >>/var/log/k3s.log 2>&1 </dev/null & echo $!"


def up(lab: Bench, nodes: int, *more: str) -> None:
    """Machines that k3sagentd was installed on, and not yet configured."""
    lab.run("up", "--nodes", str(nodes), "--unconfigured", *FAST, *more)


def root(name: str) -> Path:
    return site.load().machine(name)


def tell(name: str, **options: object) -> None:
    """The operator's own configuration of K3s, with the site's token as K3s's."""
    file = root(name) / "etc/rancher/k3s/config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    address = network.address_of(site.load().machines[name])
    told = {"token": site.load().token, "node-name": f"old-{name}", "node-ip": address}
    file.write_text(yaml.safe_dump({**told, **options}))


def start(lab: Bench, name: str) -> str:
    """Start K3s as an operator would; its pid inside the machine."""
    pid = lab.inside(name, "sh", "-c", DETACH).strip()
    wait_for_k3s(lab, name)
    return pid


def wait_for_k3s(lab: Bench, name: str) -> None:
    log = root(name) / "var/log/k3s.log"
    deadline_s = time.monotonic() + 60
    while "k3s is up and running" not in log.read_text():
        assert time.monotonic() < deadline_s, lab.logs()
        time.sleep(0.1)


def configure(names: list[str]) -> None:
    for name in names:
        site.load().give_token(name)


def untouched(lab: Bench, name: str, pid: str) -> None:
    assert "standin\0server" in lab.inside(name, "cat", f"/proc/{pid}/cmdline")
    assert not list((root(name) / "etc/rancher").rglob("*k3sagentd*"))
    assert not (root(name) / "var/lib/k3sagentd-apply/installed.json").exists()
    assert not list((root(name) / "var/lib/rancher").rglob("k3sagentd.json"))


def ca_of(lab: Bench, name: str) -> str:
    file = "/var/lib/rancher/k3s/server/tls/server-ca.crt"
    return lab.inside(name, "sha256sum", file).split()[0]


def test_a_cluster_of_three_is_adopted_and_a_fourth_machine_joins_it(lab: Bench) -> None:
    up(lab, 4)
    servers = ["node1", "node2", "node3"]
    tell("node1", **{"cluster-init": True})
    pids = {"node1": start(lab, "node1")}
    for name in servers[1:]:
        tell(name, server=f"https://{network.address_of(1)}:6443")
        pids[name] = start(lab, name)
    cluster = members(lab, "node1")["header"]["cluster_id"]
    configure(servers)
    lab.until(lambda v: len(v) == 3 and complete(v), 120)
    configure(["node4"])
    views = lab.until(lambda v: len(v) == 4 and complete(v), 120)
    assert agreed(views)["ca_hash"] == ca_of(lab, "node1")
    for name in servers:
        assert views[name]["node"]["role"] == "server"
        assert views[name]["node"]["name"] == f"old-{name}"
        untouched(lab, name, pids[name])
    assert views["node4"]["node"]["role"] == "agent"
    assert members(lab, "node2")["header"]["cluster_id"] == cluster
    names = lab.inside("node1", "k3s", "kubectl", "get", "nodes").split()
    assert {"old-node1", "old-node2", "old-node3", "node4"} <= set(names)


def test_one_sqlite_server_becomes_etcd_and_keeps_its_rows(lab: Bench) -> None:
    up(lab, 3, "--set", "settle=30s")  # with fewer than all, fewer of them are servers
    tell("node2")
    # What outlives the command must not hold its output.
    lab.inside("node2", "sh", "-c", f'{sys.executable} -c "{SUPERVISE}" 2>/dev/null')
    wait_for_k3s(lab, "node2")
    database = root("node2") / "var/lib/rancher/k3s/server/db/state.db"
    rows = {f"/registry/configmaps/shop/item-{i}": f"of the shop, number {i}" for i in range(200)}
    with sqlite3.connect(database) as kine:
        kine.executemany("INSERT INTO kine (name, value) VALUES (?, ?)", rows.items())
    before = ca_of(lab, "node2")
    configure(["node1", "node2", "node3"])
    views = lab.until(lambda v: len(v) == 3 and complete(v), 120)
    assert agreed(views)["ca_hash"] == before == ca_of(lab, "node2")
    assert {v["node"]["role"] for v in views.values()} == {"server"}
    assert database.with_name("state.db.migrated").exists()
    assert not database.exists()
    # Found again through a member that never had the file.
    get = ("get", "--prefix", "/registry/configmaps/shop/", "--print-value-only", "-w", "simple")
    found = lab.inside("node1", *ETCDCTL[:3], *get).split("\n")
    assert sorted(filter(None, found)) == sorted(rows.values())
    assert len(members(lab, "node1")["members"]) == 3
    # Without its data it would join the others now, and not found a second cluster.
    dropin = root("node2") / "etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml"
    lab.until(lambda v: "cluster-init" not in dropin.read_text())
    said = yaml.safe_load(dropin.read_text())
    assert said.keys() == {"server", "token-file"}
    assert said["server"] in {f"https://{network.address_of(n)}:6443" for n in (1, 3)}


def test_an_old_release_is_not_asked_to_convert(lab: Bench) -> None:
    up(lab, 1, "--stand-in", "version=v1.21.2+k3s1")
    tell("node1")
    pid = start(lab, "node1")
    configure(["node1"])
    wanted = "K3s is v1.21.2 here; releases before v1.22.2 start empty"
    lab.until(lambda v: wanted in json.dumps(v["node1"]))
    untouched(lab, "node1", pid)


def test_two_clusters_under_one_token_are_both_named_and_left_alone(lab: Bench) -> None:
    up(lab, 3)
    pids = {}
    for name in ("node1", "node2"):
        tell(name, **{"cluster-init": True})
        pids[name] = start(lab, name)
    configure(["node1", "node2", "node3"])
    clusters = [ca_of(lab, name)[:12] for name in pids]
    views = lab.until(
        lambda v: len(v) == 3 and all(x["node"]["phase"] == "conflict" for x in v.values())
    )
    for view in views.values():
        assert view["site"]["phase"] == "conflict"
        assert all(cluster in view["node"]["waiting_for"] for cluster in clusters)
    for name, pid in pids.items():
        untouched(lab, name, pid)
    assert not (root("node3") / "var/lib/rancher/k3s").exists()


def test_a_server_of_another_token_is_told_where_to_put_it(lab: Bench) -> None:
    up(lab, 1)
    tell("node1", **{"cluster-init": True, "token": "of-the-operators-own"})
    pid = start(lab, "node1")
    configure(["node1"])
    lab.until(lambda v: "into /etc/k3sagentd/token on all machines" in json.dumps(v["node1"]))
    untouched(lab, "node1", pid)
