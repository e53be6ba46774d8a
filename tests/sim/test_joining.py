# SPDX-License-Identifier: Apache-2.0
"""Who joins, under which name, and who counts as a member meanwhile. Each was a bug."""

from dataclasses import replace

from k3sagentd.core.events import AddressChanged
from k3sagentd.core.k3s import Action, Datastore, Facts, ServerOrAgent
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.scenario import Machine
from tests.sim.scenes import CA, THREE_SERVERS, node_of, play, said


def test_who_hears_its_namesake_late_takes_another_name() -> None:
    wire = play(
        "site a b nodes=2 servers=1\non a b\nmeet a b\ndeliver\napply a done\nprobed a\ndeliver\n"
        "apply b done\nprobed b\ndeliver\ngo 60s\nsite z nodes=2 servers=1"
    )
    late = wire.machines["z"]
    late.site = replace(late.site, hostname="b")
    play("on z\nmeet a z\ndeliver", wire)
    assert node_of(wire, "z").durable.node_name == "b"
    play("meet b z\ngo 60s", wire)
    assert node_of(wire, "z").durable.node_name == "b-z"
    order = late.order
    assert order is not None
    assert (order.action, order.node_name) == (Action.JOIN, "b-z")


def test_a_joiner_whose_order_failed_after_k3s_was_started_is_not_removed() -> None:
    """It asks anew where to join, and its Node is there already: a member which starts."""
    wire = play(THREE_SERVERS.partition("apply c done\nprobed c")[0])
    c = wire.machines["c"]
    heard = wire._kube.is_ready
    wire._kube.is_ready = lambda kube: kube.name != "c" and heard(kube)
    wire._kube.register(c.id, c.site.hardware, server=True)
    play("go 40s\napply c late\ngo 120s", wire)
    assert node_of(wire, "c").announced.member
    assert "c" in wire._kube.nodes
    assert node_of(wire, "c").drive.told == "a: K3s on c to be ready: it is a member of etcd"
    wire._kube.is_ready = heard
    play("probed c\ngo 10s", wire)
    assert node_of(wire, "c").phase is NodePhase.READY
    assert c.order is not None
    assert (c.order.action, c.order.attempt) == (Action.JOIN, 1), "what failed is done again"


def test_a_joiner_that_cannot_start_k3s_is_no_member() -> None:
    """Else nobody would take the place of a machine that never gets so far."""
    wire = play(THREE_SERVERS.partition("apply c done\nprobed c")[0] + "apply c failed")
    assert not node_of(wire, "c").announced.member


def test_a_server_that_never_gets_ready_does_not_keep_the_others_few() -> None:
    until_b = THREE_SERVERS.partition("probed b")[0]
    wire = play(until_b + "go 290s")
    c = wire.machines["c"]
    assert said(wire, "c") == "server b to be ready first"
    play("go 30s", wire)
    assert c.order is not None
    assert c.order.action is Action.JOIN


def test_an_agent_whose_name_was_taken_meanwhile_says_by_whom() -> None:
    """It was off for longer than replace-after, and a new machine has its hostname."""
    wire = play(THREE_SERVERS)
    play("ready d\ngo 10s\noff d\ngo 20s", wire)
    d, other = wire.machines["d"], NodeId("d-z")
    blank = Facts(fsync_ms=1.0)
    site = replace(d.site, hardware="of d-z")
    wire.machines[other] = Machine(other, site, Durable(node=other), blank)
    play("on d-z\nmeet a b c d-z\ngo 400s\napply d-z done\nready d-z\ngo 10s", wire)
    assert wire._kube.nodes["d"].node == other
    d.facts = replace(blank, datastore=Datastore.AGENT, ca_hash=CA)
    play("on d\nmeet a b c d d-z\ndeliver\ngo 5s\napply d done\ngo 200s", wire)
    taken = "another name: d is the machine at "
    assert taken in said(wire, "d")
    assert "k3sagentd reset there" in said(wire, "d")


def test_an_agent_follows_its_own_new_address_while_it_is_ready() -> None:
    wire = play(THREE_SERVERS)
    d = wire.machines["d"]
    play("ready d\ngo 10s", wire)
    before = d.order
    wire._feed(d, AddressChanged(now_s=wire.now_s, address="10.0.9.99", also=("10.0.0.4",)))
    assert d.order == before, "it has the old one as well"
    wire._feed(d, AddressChanged(now_s=wire.now_s, address="10.0.9.99"))
    assert d.order is not None
    assert before is not None
    assert (d.order.action, d.order.attempt) == (Action.JOIN, before.attempt + 1)
    play("apply d done\ngo 600s", wire)
    assert d.order.attempt == before.attempt + 1


def test_a_dead_server_and_one_that_comes_in_do_not_wait_for_each_other() -> None:
    """The one waited for the dead to be prepared, the roster for the one to be ready."""
    wire = play(THREE_SERVERS)
    play("off d\nrole d server\nrole e server\non d e\nmeet a b c d e\ngo 10s\nready d", wire)
    play("go 10s\noff d\napply e done\ngo 100s", wire)
    assert said(wire, "e") == "d to be prepared (servers join when all are)"
    play("go 300s\napply e done\ngo 30s", wire)
    order = wire.machines["e"].order
    assert order is not None
    assert (order.action, order.role) == (Action.JOIN, ServerOrAgent.SERVER)
    play("ready e\ngo 700s", wire)
    servers = node_of(wire, "a").roster.servers
    assert len(servers) == 3
    assert "e" in servers, "it takes another's place, as was asked for"
    assert "d" not in servers


def test_a_joiner_that_cannot_prepare_is_asked_again_after_growing_pauses() -> None:
    """Struck out at once, and listed again as a new one, it prepared every eight seconds."""
    wire = play(THREE_SERVERS + "\nrole e server\non e\nmeet a b c d e\ndeliver")
    orders = set()
    for _ in range(1200):
        play("go 1s", wire)
        order, ordered_s = wire.machines["e"].order, node_of(wire, "e").drive.ordered_s
        if order is not None and ordered_s not in orders:
            orders.add(ordered_s)
            play("apply e failed" if order.action is Action.PREPARE else "apply e done", wire)
    assert node_of(wire, "a").roster.revision < 12
    assert len(orders) < 40
