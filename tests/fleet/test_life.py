# SPDX-License-Identifier: Apache-2.0
"""Life after the seal, through the real units: a server dies for good, all addresses change, an
agent forgets the token."""

import base64
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fleet.conftest import RELEASES, Fleet
from tests.fleet.machine import UNITS, Machine

QUICK = "promote_s: 2\nnode_grace_s: 4\n"
"""The stand-in's clocks, which in K3s are 15 s and 40 s."""


@pytest.fixture(scope="module")
def site(fleet: Fleet) -> Fleet:
    """Five machines, complete."""
    for number in range(5):
        machine = fleet.add(RELEASES[number % len(RELEASES)])
        machine.put("etc/k3s-standin.yaml", QUICK)
        fleet.configure(machine, **{"replace-after": "10s"})
        machine.on()
    with timed("power-on to complete"):
        fleet.complete()
    return fleet


@contextmanager
def timed(what: str) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    print(f"\n  {time.monotonic() - start_s:5.1f} s  {what}", end="")


def of_role(site: Fleet, role: str) -> list[Machine]:
    views = site.views()
    return [m for m in site.machines if views.get(m.name, {"node": {}})["node"].get("role") == role]


def etcd(machine: Machine, path: str, **what: str | bool) -> dict:
    """Ask etcd itself, through its gateway."""
    code = (
        "import sys; from urllib.request import urlopen; "
        "print(urlopen('http://127.0.0.1:2379/v3/' + sys.argv[1], sys.argv[2].encode()).read()"
        ".decode())"
    )
    return json.loads(machine.run("python3", "-c", code, path, json.dumps(what)))


def members(machine: Machine) -> list[str]:
    """etcd's own list; each has started."""
    found = etcd(machine, "cluster/member/list")["members"]
    assert all(each.get("name") for each in found), found
    return sorted(each["peerURLs"][0] for each in found)


def addresses(machines: list[Machine]) -> list[str]:
    return sorted(f"http://{machine.address}:2380" for machine in machines)


def assert_is(machine: Machine, role: str) -> None:
    """K3s's unit of that role runs, now and at every boot; the other's, if there is one, never."""
    show = ("systemctl", "show", "--value", "-p", "ActiveState,UnitFileState")
    for each, unit in UNITS.items():
        found = machine.run(*show, unit).split()
        wanted = (
            [["active", "enabled"]] if each == role else [["inactive", "disabled"], ["inactive"]]
        )
        assert found in wanted, (machine.name, unit, found)
    machine.assert_healthy()


def test_a_dead_server_is_replaced_and_comes_back_as_an_agent(site: Fleet) -> None:
    before = site.complete()
    init = before["m1"]["site"]["init_node"]
    (dead,) = [m for m in site.machines if before[m.name]["node"]["id"] == init]
    agents = of_role(site, "agent")
    dead.cut()

    def replaced(views: dict[str, dict]) -> bool:
        nodes = [view["node"] for view in views.values()]
        servers = [node for node in nodes if node["role"] == "server"]
        return len(servers) == 3 and all(node["phase"] == "ready" for node in nodes)

    with timed("a server dies, an agent has taken its place"):
        site.until(replaced)
    servers = of_role(site, "server")
    (promoted,) = [machine for machine in agents if machine in servers]
    get = ("k3s", "kubectl", "get", "nodes", "-o", "name")
    site.until(lambda _: len(promoted.run(*get, check=False).split()) == 4)
    assert members(promoted) == addresses(servers)
    assert_is(promoted, "server")

    dead.on()
    with timed("it comes back, and is an agent"):
        after = site.complete()
    assert after[dead.name]["node"]["role"] == "agent"
    assert of_role(site, "server") == servers
    assert members(promoted) == addresses(servers)
    assert_is(dead, "agent")
    for view in after.values():
        for key in ("id", "epoch", "init_node", "ca_hash"):
            assert view["site"][key] == before["m1"]["site"][key]


def test_all_five_in_the_dark_and_every_address_is_another(site: Fleet) -> None:
    before = site.complete()
    servers, agents = of_role(site, "server"), of_role(site, "agent")
    old = {server.name: server.address for server in servers}
    key, value = (base64.b64encode(text).decode() for text in (b"/mine", b"precious"))
    etcd(servers[-1], "kv/put", key=key, value=value)
    # A reset goes on with one server's copy, so all have it before the cut.
    for server in servers:
        while "kvs" not in etcd(server, "kv/range", key=key, serializable=True):
            time.sleep(0.1)
    for machine in site.machines:
        machine.cut()
        machine.move()
    for machine in random.Random(5).sample(site.machines, 5):
        machine.on()

    # Servers say what is wrong, and nobody does anything about it: not with the data, not at all.
    def waits(views: dict[str, dict]) -> bool:
        asks = [views[m.name]["node"]["waiting_for"] for m in servers if m.name in views]
        return (
            len([line for line in asks if "etcd knows this server" in str(line)]) == 3
            and all(view["site"]["seen"] == 5 for view in views.values())
            and sum(row["moved"] for row in views[servers[0].name]["nodes"]) == 3
        )

    with timed("all five off and on at other addresses: the servers say what is wrong"):
        site.until(waits)
    for server in servers:
        line = f"etcd knows this server at {old[server.name]}, its address is {server.address} now"
        status = server.booted().run("systemctl", "status", "k3sagentd")
        assert f'Status: "joining: waiting for a person: {line}; give it back, or run' in status
        assert server.run("ls", "/var/lib/rancher/k3s/server/db").split() == ["etcd"]
        assert f"node-ip: {old[server.name]}" in dropin(server)

    with timed("repaired, one after the other, and the agents have followed"):
        said = servers[0].run("k3sagentd", "repair-addresses", "--yes")
        assert "this server is the cluster now" in said
        for server in servers[1:]:
            site.until(lambda _, server=server: repaired(server))
        after = site.complete()
    for name, view in after.items():
        for field in ("id", "epoch", "init_node", "ca_hash"):
            assert view["site"][field] == before[name]["site"][field]
        assert view["node"]["id"] == before[name]["node"]["id"]
    assert of_role(site, "server") == servers
    assert members(servers[0]) == addresses(servers)
    get = ("k3s", "kubectl", "get", "nodes")
    site.until(
        lambda _: (
            [line.split()[1] for line in servers[1].run(*get, check=False).splitlines()[1:]]
            == ["Ready"] * 5
        )
    )
    for server in servers:
        (found,) = etcd(server, "kv/range", key=key)["kvs"]
        assert found["value"] == value
        assert_is(server, "server")
    for agent in agents:
        assert any(f"server: https://{server.address}:6443" in dropin(agent) for server in servers)
        assert_is(agent, "agent")


def test_an_agent_forgets_the_token_and_boots_without_it(site: Fleet) -> None:
    site.complete()
    # Who was a server keeps the token with the data that was moved aside, and says so.
    data = ("ls", "/var/lib/rancher/k3s")
    agents = of_role(site, "agent")
    agent = next(m for m in agents if "server.before-agent" not in m.run(*data))
    site.configure(agent, **{"replace-after": "10s", "forget-token": True})
    agent.run("systemctl", "restart", "k3sagentd")

    def forgotten(views: dict[str, dict]) -> bool:
        notes = views.get(agent.name, {"node": {"notes": []}})["node"]["notes"]
        return any("forgot the site's token" in note for note in notes)

    site.until(forgotten)
    token = ("grep", "-rlF", "-e", site.token, "/etc", "/var/lib/k3sagentd", "/var/lib/rancher")
    assert agent.run(*token, check=False) == ""
    assert of_role(site, "server")[0].run(*token, check=False), "a server needs it"
    agent.cut()
    agent.on()
    agent.booted()
    with timed("an agent that forgot the token boots"):
        views = site.complete()
    assert views[agent.name]["node"]["role"] == "agent"
    assert "token-file" in dropin(agent)
    agent.assert_healthy()


def repaired(machine: Machine) -> bool:
    """The command, which refuses until another server is seen to be ready and this one dead."""
    return "K3s starts" in machine.run("k3sagentd", "repair-addresses", "--yes", check=False)


def dropin(machine: Machine) -> str:
    return machine.run("cat", "/etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml")
