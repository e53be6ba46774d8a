# SPDX-License-Identifier: Apache-2.0
"""What a person does later, through the real units: k3sagentd comes to a K3s that is there, one
address by keepalived, a server leaves and is reset, K3s is upgraded."""

import time

import pytest

from tests.fleet import base
from tests.fleet.conftest import RELEASES, Fleet
from tests.fleet.machine import Machine
from tests.fleet.test_life import QUICK, assert_is, members, timed

VIP = "10.77.0.250"
INSTALLER = "root/install.sh"
SCRIPT = base.ROOT / "tests/fleet/site/install.sh"
NEWER = "v1.34.1+k3s1"
ASK = ("curl", "-sS", "--max-time", "5", "--cacert", "/root/ca.crt", f"https://{VIP}:6443/ping")
"""As ``kubectl`` does: by the cluster's CA, with the address in the certificate."""


@pytest.fixture(scope="module")
def site(fleet: Fleet) -> Fleet:
    """Four machines with an unconfigured k3sagentd; the first runs a K3s of somebody else."""
    for number in range(4):
        machine = fleet.add(RELEASES[number % len(RELEASES)])
        machine.put("etc/k3s-standin.yaml", QUICK)
        machine.on()
    first = fleet.machines[0].booted()
    first.put_now(INSTALLER, SCRIPT.read_bytes(), 0o755)
    first.run(f"/{INSTALLER}", "server", "--cluster-init")
    return fleet


def configure(fleet: Fleet, machine: Machine, **other: object) -> None:
    shared = {"nodes": 4, "replace-after": "10s", "virtual-ip": f"{VIP}/24"}
    fleet.configure(machine, **shared, **other)


def started(machine: Machine, unit: str) -> str:
    return machine.run("systemctl", "show", "--value", "-p", "MainPID,NRestarts", unit)


def holders(site: Fleet) -> list[Machine]:
    show = ("ip", "-4", "-o", "address", "show", "eth0")
    return [machine for machine in site.machines if VIP in machine.run(*show)]


def one_holder(site: Fleet, *, but: Machine | None = None, timeout_s: float = 120) -> Machine:
    """Who has the address, once it is one and answers to the others."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = holders(site)
        if len(found) == 1 and found[0] is not but:
            asks = next(machine for machine in site.machines if machine is not found[0])
            if (said := asks.run(*ASK, check=False)) == "pong":
                return found[0]
            print(f"\n{asks.name} asks {found[0].name}: {said}", end="")
        time.sleep(0.3)
    states = [m.run("systemctl", "status", "keepalived", check=False) for m in site.machines]
    raise AssertionError(f"{VIP} is on {[m.name for m in holders(site)]}\n" + "".join(states))


def test_a_k3s_that_is_there_is_joined_and_not_restarted(site: Fleet) -> None:
    first, *others = site.machines
    site.until(lambda _: "Ready" in first.run("k3s", "kubectl", "get", "nodes", check=False))
    before = started(first, "k3s")
    # K3s takes no other token than its own: the site gets its password.
    site.token = first.run("cat", "/var/lib/rancher/k3s/server/token").strip().rpartition(":")[2]
    for machine in site.machines:
        configure(site, machine.booted())
        site.until(lambda views, machine=machine: machine.name in views)
    with timed("k3sagentd is configured beside a K3s, and three machines join it"):
        views = site.complete(4)
    assert views["m1"]["site"]["init_node"] == views["m1"]["node"]["id"]
    assert started(first, "k3s") == before
    assert not first.run("ls", "/etc/rancher/k3s", check=False).count("50-k3sagentd")
    servers = [m for m in site.machines if views[m.name]["node"]["role"] == "server"]
    assert first in servers
    assert len(servers) == 3
    assert len(members(first)) == 3
    for machine in others:
        assert_is(machine, "server" if machine in servers else "agent")
        ca = first.run("cat", "/var/lib/rancher/k3s/server/tls/server-ca.crt")
        machine.put_now("root/ca.crt", ca)
    first.put_now("root/ca.crt", ca)


def test_keepalived_keeps_the_address_and_gives_it_up_to_who_stays(site: Fleet) -> None:
    first = site.machines[0]
    holder = one_holder(site)
    assert holder is not first, "what it did not install it does not configure"
    with timed("the server that has the address leaves, another has it"):
        said = holder.run("k3sagentd", "leave", "--yes")
        assert "this machine has left" in said
        one_holder(site, but=holder)
    assert holder.run("systemctl", "is-enabled", "k3s", check=False).strip() == "disabled"
    assert holder.run("systemctl", "is-active", "keepalived", check=False).strip() == "inactive"
    nodes = first.run("k3s", "kubectl", "get", "nodes", "-o", "name").split()
    assert len(nodes) == 3
    status = holder.run("systemctl", "status", "k3sagentd", check=False)
    assert "inactive (dead)" in status

    def replaced(views: dict[str, dict]) -> bool:
        nodes = [view["node"] for view in views.values()]
        return len(nodes) == 3 and all(
            node["phase"] == "ready" and node["role"] == "server" for node in nodes
        )

    with timed("the agent has taken its place"):
        site.until(replaced)

    # A boot does not bring it back; a reset makes a new machine of it, which joins.
    holder.cut()
    holder.on()
    holder.booted()
    assert (
        holder.run("systemctl", "is-active", "k3s", "k3sagentd", check=False).split()
        == ["inactive"] * 2
    )
    said = holder.run("k3sagentd", "reset", "--yes")
    assert "run /usr/local/bin/k3s-uninstall.sh" in said
    assert not holder.run("ls", "/var/lib/rancher", check=False).count("k3s\n")
    holder.run("systemctl", "start", "k3sagentd")
    with timed("it is reset, and joins as a new machine"):
        views = site.complete(4)
    assert views[holder.name]["node"]["role"] == "agent"
    assert_is(holder, "agent")
    assert len(members(first)) == 3


def test_k3s_is_upgraded_by_its_own_script(site: Fleet) -> None:
    """One machine after the other, as K3s's documentation says; servers first."""
    before = site.complete(4)
    order = sorted(site.machines, key=lambda m: before[m.name]["node"]["role"] == "agent")
    for machine in order:
        role = before[machine.name]["node"]["role"]
        machine.put_now("etc/k3s-standin.yaml", f"{QUICK}version: {NEWER}\n")
        machine.put_now(INSTALLER, SCRIPT.read_bytes(), 0o755)
        more = ["--cluster-init"] if machine is site.machines[0] else []
        machine.run("env", f"INSTALL_K3S_VERSION={NEWER}", f"/{INSTALLER}", role, *more)
        name = before[machine.name]["node"]["name"]
        site.until(lambda _, name=name: releases(site.machines[0]).get(name) == NEWER)
        after = site.complete(4)
        assert after[machine.name]["site"]["ca_hash"] == before["m1"]["site"]["ca_hash"]
        assert_is(machine, role)
    assert len(members(site.machines[0])) == 3
    # Nor does the daemon take anything back, or restart a server.
    servers = [m for m in order if role_of(after, m) == "server"]
    running = [started(machine, "k3s") for machine in servers]
    for machine in order:
        machine.run("systemctl", "restart", "k3sagentd")
    site.complete(4)
    assert [started(machine, "k3s") for machine in servers] == running
    assert set(releases(site.machines[0]).values()) == {NEWER}


def role_of(views: dict[str, dict], machine: Machine) -> str:
    return str(views[machine.name]["node"]["role"])


def releases(machine: Machine) -> dict[str, str]:
    """Of each Node, as its kubelet tells it."""
    get = ("k3s", "kubectl", "get", "nodes", "--no-headers")
    rows = [line.split() for line in machine.run(*get, check=False).splitlines()]
    return {row[0]: row[-1] for row in rows if len(row) == 5}
