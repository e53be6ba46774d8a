# SPDX-License-Identifier: Apache-2.0
"""Life after the seal: machines die, come back, get a new image, change their role, and leave.

One site of four machines, three of them servers, serves all these tests: each finds it whole and
leaves it whole; where one did not, the next has a new one.
"""

from collections.abc import Iterator

import pytest

from k3sagentd.lab import network, site
from tests.lab.cluster import (
    YES,
    QuorumWatch,
    agents,
    cluster_id,
    configure,
    files,
    has_password,
    init_machine,
    k3sagentd,
    leaves,
    nodes,
    refused,
    restart_daemon,
    said,
    servers,
    uid,
    voters,
    wipe,
)
from tests.lab.conftest import Bench, agreed

STAND_IN = ("--stand-in", "promote_s=2", "--stand-in", "node_grace_s=4")
# Who elects waits for all machines: with fewer, fewer of them are servers.
LIFE = (*STAND_IN, "--set", "settle=30s", "--set", "replace-after=10s")
WHOLE_S = 5.0


@pytest.fixture(scope="module")
def standing() -> Iterator[Bench]:
    """Taken down after all."""
    site.down()
    yield Bench()
    site.down()
    assert not list(network.NETNS.glob(f"{network.PREFIX}*"))


@pytest.fixture
def lab(standing: Bench) -> Bench:
    """Four machines or more, all ready, three of them servers."""
    if not site.directory().exists() or not is_whole(standing.views()):
        site.down()
        standing.run("up", "--nodes", "4", "--wait", "complete", *LIFE)
    return standing


def is_whole(views: dict[str, dict]) -> bool:
    """Whether all machines are on and ready, and three of them servers."""
    ready = [servers(views), agents(views)]
    return len(ready[0]) == 3 and len(ready[0]) + len(ready[1]) == len(views) > 3


def whole(lab: Bench) -> dict[str, dict]:
    """Wait until the site is whole; returns the views."""
    return lab.until(lambda v: len(v) == len(site.load().machines) and is_whole(v))


def etcd_data(name: str) -> set[int]:
    """The inodes of all data of etcd on a machine, wherever it was moved."""
    found = (files(name) / "var/lib/rancher").rglob("member")
    return {path.stat().st_ino for path in found}


def address(name: str) -> str:
    return network.address_of(site.load().machines[name])


@pytest.mark.parametrize("who", ["a server", "the init node"])
def test_a_dead_server_is_replaced(lab: Bench, who: str) -> None:
    before = lab.views()
    init, (agent, *_) = init_machine(before), agents(before)
    others = [name for name in servers(before) if name != init]
    dead, *survivors = (init, *others) if who == "the init node" else (*others, init)
    identity, data = cluster_id(dead), etcd_data(dead)
    lab.run("kill", dead)
    with QuorumWatch(survivors[0]):
        lab.until(lambda v: agent in servers(v) and len(servers(v)) == 3)
        lab.until(lambda _: dead not in nodes(survivors[0]))
        assert voters(survivors[0]) == sorted(address(each) for each in [agent, *survivors])
        assert not has_password(survivors[0], dead)
        assert nodes(survivors[0])[agent]["metadata"]["labels"]["kubernetes.io/hostname"] == agent
        # It comes back: to the same cluster, as an agent; what it had is aside.
        lab.run("start", dead)
        views = whole(lab)
    assert dead in agents(views)
    agreed(views)
    assert {cluster_id(each) for each in servers(views)} == {identity}
    assert voters(agent) == sorted(address(each) for each in servers(views))
    assert not (files(dead) / "var/lib/rancher/k3s/server").exists()
    assert data
    assert data <= etcd_data(dead)


def test_a_machine_with_a_new_image_gets_back_in(lab: Bench) -> None:
    before = lab.views()
    server, witness, *_ = servers(before)
    for name in (agents(before)[0], server):
        was = uid(witness, name)
        lab.run("kill", name)
        wipe(name)
        lab.run("start", name)
        # Its hardware says that the machine before is no more: nobody waits for its return.
        lab.until(lambda v, n=name: _is_ready(v, n, never="to be surely gone"))
        views = whole(lab)
        assert views[name]["node"]["id"] != before[name]["node"]["id"]
        lab.until(lambda _, n=name, w=was: uid(witness, n) != w)
    agreed(views)
    assert voters(witness) == sorted(address(each) for each in servers(views))
    assert set(nodes(witness)) == set(views)


def _is_ready(views: dict[str, dict], name: str, *, never: str) -> bool:
    assert never not in said(views, name)
    return views[name]["node"]["phase"] == "ready"


def test_roles_are_changed_by_hand(lab: Bench) -> None:
    before = lab.views()
    agent, (server, witness, *_) = agents(before)[0], servers(before)
    with QuorumWatch(witness, fewest=3):
        # Another becomes a server first, then it steps down.
        configure(server, role="agent")
        restart_daemon(lab, server)
        lab.until(lambda v: server in agents(v))
        views = whole(lab)
        assert agent in servers(views)
        assert voters(witness) == sorted(address(each) for each in servers(views))
        # And back again, at its daemon's next start; one of the others makes room.
        configure(server, role="server")
        restart_daemon(lab, server)
        lab.until(lambda v: server in servers(v))
        views = whole(lab)
    agreed(views)
    configure(server, role="auto")


def test_only_a_fresh_machine_can_take_the_place(lab: Bench) -> None:
    before = lab.views()
    dead, *survivors = servers(before)
    off = [dead, *agents(before)]
    for name in off:
        lab.run("kill", name)
    nobody = "no machine here can take its place; power it on, or add one"
    lab.until(lambda v: all(nobody in said(v, each) for each in survivors))
    # Nothing is removed; and no other may go, for etcd would stand still.
    assert set(nodes(survivors[0])) == set(before)
    assert len(voters(survivors[0])) == 3
    assert "1 of the 2 servers that stay are ready, 2 must be" in refused(
        lab, survivors[0], "leave", YES
    )
    new = lab.run("add").split()[0]
    lab.until(lambda v: {new, *survivors} == set(servers(v)))
    lab.until(lambda _: dead not in nodes(survivors[0]))
    # It was never an agent, whose data would be aside.
    assert not list((files(new) / "var/lib/rancher/k3s").glob("agent.*"))
    for name in off:
        lab.run("start", name)
    views = whole(lab)
    assert set(off) == set(agents(views))
    agreed(views)


def test_an_agent_leaves(lab: Bench) -> None:
    before = lab.views()
    server, agent = servers(before)[0], agents(before)[0]
    k3sagentd(lab, agent, "leave", YES)
    lab.until(lambda v: agent not in v)
    assert agent not in nodes(server)
    # It stays away over a power cut, and says why.
    lab.run("kill", agent)
    lab.run("start", agent)
    assert "has left its site" in refused(lab, agent, "status")
    reset(lab, agent)
    assert agent in agents(whole(lab))


def test_a_server_leaves(lab: Bench) -> None:
    before = lab.views()
    server, witness, *_ = servers(before)
    with QuorumWatch(witness):
        leaves(lab, server)
        lab.until(lambda v: server not in v)
        assert server not in nodes(witness)
        assert address(server) not in voters(witness)
        # The others are three again, and who left may come back as a new machine.
        lab.until(lambda v: len(servers(v)) == 3)
        reset(lab, server)
        views = whole(lab)
    assert server in agents(views)
    assert voters(witness) == sorted(address(each) for each in servers(views))


def reset(lab: Bench, name: str) -> None:
    """Make a new machine of one that has left."""
    k3sagentd(lab, name, "reset", YES)
    lab.run("kill", name)
    lab.run("start", name)
