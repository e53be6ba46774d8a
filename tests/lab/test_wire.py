# SPDX-License-Identifier: Apache-2.0
"""The wire as it is in the field: avahi beside us, no multicast, late and new addresses."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from k3sagentd.lab import network, site
from tests.lab.conftest import FAST, ROOT, Bench

AVAHI = """
[server]
enable-dbus=no
allow-interfaces=eth0
"""
ENTER = "mount -t tmpfs tmpfs /run && mkdir /run/avahi-daemon && exec avahi-daemon -f {conf}"
NO_MULTICAST = """
table bridge quiet {
  chain forward {
    type filter hook forward priority 0;
    ip daddr 224.0.0.0/4 drop
    ip6 daddr ff00::/8 udp dport 5353 drop
  }
}
"""


def nominated(views: dict[str, dict]) -> bool:
    return all(v["site"]["phase"] in ("nominated", "sealed") for v in views.values())


def test_it_lives_beside_avahi(lab: Bench, tmp_path: Path) -> None:
    conf = tmp_path / "avahi.conf"
    conf.write_text(AVAHI)
    lab.run("up", "--nodes", "3", *FAST)
    for name in ("node1", "node2"):
        lab.run("kill", name)
    command = ["ip", "netns", "exec", network.namespace("node1"), "sh", "-c"]
    avahi = subprocess.Popen(
        [*command, ENTER.format(conf=conf)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        time.sleep(1)
        for name in ("node1", "node2"):
            lab.run("start", name)
        lab.until(
            lambda v: (
                len(v) == 3
                and nominated(v)
                and all(view["site"]["seen"] == 3 for view in v.values())
            )
        )
        assert avahi.poll() is None, avahi.stderr.read() if avahi.stderr else ""
    finally:
        avahi.terminate()
        avahi.wait(10)


def test_seeds_do_where_multicast_is_blocked(lab: Bench) -> None:
    lab.run(
        "up",
        "--nodes",
        "3",
        *FAST,
        "--set",
        "seeds=[10.77.0.11]",
        "--partition",
        "node1 / node2 / node3",
    )
    network.run("ip", "netns", "exec", network.SWITCH, "nft", "-f", "-", stdin=NO_MULTICAST)
    lab.run("heal")
    views = lab.until(lambda v: len(v) == 3 and nominated(v))
    assert len({(x["site"]["epoch"], x["site"]["init_node"]) for x in views.values()}) == 1


def test_an_address_that_comes_late_and_changes_is_followed(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", *FAST)
    late = network.namespace("node3")
    lab.run("kill", "node3")
    network.run("ip", "-n", late, "address", "flush", "dev", "eth0")
    lab.run("start", "node3")
    waits = "an address on the network interface"
    lab.until(lambda v: v["node3"]["node"]["waiting_for"] == waits)
    for address in ("10.77.0.91", "10.77.0.92"):
        network.run("ip", "-n", late, "address", "flush", "dev", "eth0")
        network.run("ip", "-n", late, "address", "add", f"{address}/24", "dev", "eth0")
        network.run("ip", "-n", late, "route", "add", "default", "via", network.GATEWAY)
        lab.until(lambda v, a=address: v["node3"]["node"]["address"] == a)
        lab.until(
            lambda v, a=address: all(
                a in [row["address"] for row in view["nodes"]] for view in v.values()
            )
        )


def test_a_crashed_lab_is_cleaned_up_by_the_next(lab: Bench) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "k3sagentd", "lab", "--nodes", "2", "--wait", "complete"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while not (site.directory() / "nodes/node2/pid").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    lab.run("up", "--nodes", "1", *FAST, "--wait", "sealed")
    assert list(lab.views()) == ["node1"]


def test_ctrl_c_takes_everything_down(lab: Bench) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "k3sagentd", "lab", "--nodes", "2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while not (site.directory() / "nodes/node2/pid").exists():
        assert first.poll() is None
        time.sleep(0.05)
    pids = [site.load().pid(name) for name in ("node1", "node2")]
    first.send_signal(signal.SIGINT)
    assert first.wait(180) == 0
    assert not site.directory().exists()
    assert not list(network.NETNS.glob(f"{network.PREFIX}*"))
    assert not any(pid is not None and site.start_time(pid) for pid in pids)
