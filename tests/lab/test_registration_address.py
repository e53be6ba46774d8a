# SPDX-License-Identifier: Apache-2.0
"""The addresses of the cluster that are no server's own: somebody else's, and the mDNS name."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from k3sagentd.lab import network, site
from tests.lab import bystander
from tests.lab.conftest import FAST, ROOT, Bench
from tests.lab.test_wire import AVAHI, ENTER

BALANCER = 190
"""Its number on the wire, far from the machines'."""
LAPTOP = 80
GONE_BOUND_S = 30.0
"""A peer is known to be gone after 12 s."""


def joined_at(lab: Bench, name: str) -> str:
    """Where a new agent was told to join."""
    assert name in lab.run("add", "--role", "agent")
    lab.until(lambda v: v[name]["node"]["phase"] == "ready")
    path = site.load().machine(name) / "etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml"
    return str(yaml.safe_load(path.read_text())["server"])


def test_an_outside_address_is_used_while_it_is_the_clusters(lab: Bench, tmp_path: Path) -> None:
    fixed = network.address_of(BALANCER)
    one = ("up", "--nodes", "1", "--wait", "complete", *FAST)
    lab.run(*one, "--set", f"registration-address={fixed}")
    server = network.address_of(1)
    urls = lab.views()["node1"]["site"]["registration"]
    assert urls[:2] == [f"https://{fixed}:6443", f"https://{server}:6443"]

    # Nobody is there yet: like a packet filter that drops, the worst that it can be.
    assert joined_at(lab, "node2") == f"https://{server}:6443"

    bystander.plug_in("balancer", BALANCER)
    with bystander.running("balancer", "forward", server):
        assert joined_at(lab, "node3") == f"https://{fixed}:6443"
    with bystander.running("balancer", "pose", str(tmp_path / "theirs"), fixed):
        assert joined_at(lab, "node4") == f"https://{server}:6443"


@contextmanager
def avahi(tmp_path: Path) -> Iterator[str]:
    """An avahi-daemon on the laptop; its pid."""
    conf = tmp_path / "avahi.conf"
    conf.write_text(AVAHI)
    enter = ["ip", "netns", "exec", network.namespace("laptop"), "sh", "-c"]
    process = subprocess.Popen(
        [*enter, ENTER.format(conf=conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield str(process.pid)
    finally:
        process.terminate()
        process.wait(10)


def by_avahi(pid: str, name: str) -> str | None:
    """What avahi says, as libnss-mdns would ask it; None where it has no answer."""
    command = [sys.executable, "-m", "tests.lab.bystander", "avahi", name]
    done = subprocess.run(
        ["nsenter", "-t", pid, "--mount", "--net", f"--wdns={ROOT}", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return done.stdout.strip() or None


def answers(name: str) -> dict[str, list[str]]:
    """Every responder's own answer."""
    found = bystander.ask("laptop", "resolve", name, "1")
    assert isinstance(found, dict)
    return found


def until_answered(name: str, servers: list[str], timeout_s: float) -> None:
    """All of ``servers`` answer, nobody else, and all the same: all of them."""
    expected = {each: sorted(servers) for each in servers}
    deadline = time.monotonic() + timeout_s
    while (found := answers(name)) != expected:
        if time.monotonic() > deadline:
            pytest.fail(f"{name} is answered by {found}, not {expected}")


def test_the_mdns_name_is_the_live_servers(lab: Bench, tmp_path: Path) -> None:
    lab.run("up", "--nodes", "4", "--wait", "complete", *FAST)
    views = lab.views()
    by_address = {
        v["node"]["address"]: n for n, v in views.items() if v["node"]["role"] == "server"
    }
    assert len(by_address) == 3
    name = f"k3s-{views['node1']['site']['id'][:6]}.local"
    last = f"https://{name}:6443"
    lab.until(lambda v: all(x["site"]["registration"][-1] == last for x in v.values()))
    assert last in lab.inside("node1", "k3sagentd", "registration").splitlines()

    bystander.plug_in("laptop", LAPTOP)
    until_answered(name, list(by_address), 30)
    with avahi(tmp_path) as pid:
        deadline = time.monotonic() + 30
        while (address := by_avahi(pid, name)) is None:
            assert time.monotonic() < deadline, "avahi does not resolve it"
        assert address in by_address

        # As kubectl would: the cluster's CA, and the name must be the certificate's.
        tls = site.load().machine(by_address[address]) / "var/lib/rancher/k3s/server/tls"
        authority = tls / "server-ca.crt"
        shown = bystander.ask("laptop", "fetch", name, address, str(authority))
        assert shown == authority.read_text()

        lab.run("kill", by_address[address])
        begun_s = time.monotonic()
        until_answered(name, [each for each in by_address if each != address], GONE_BOUND_S)
        print(f"mDNS name: follows {time.monotonic() - begun_s:.1f} s after a server's end")
        while (found := by_avahi(pid, name)) in (None, address):
            assert time.monotonic() < begun_s + GONE_BOUND_S, "avahi still has the dead server"
        assert found in by_address
