# SPDX-License-Identifier: Apache-2.0
"""The servers of a sealed site: which are members, which is replaced. Each was a bug."""

from dataclasses import replace

import pytest

from k3sagentd.core import guards, status
from k3sagentd.core.cluster import KubeNode, Roster
from k3sagentd.core.hello import server_url
from k3sagentd.core.k3s import Action, Datastore, Facts, K3sState, ServerOrAgent
from k3sagentd.core.state import PEERS_LIMIT, Peer
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.scenes import CA, THREE_SERVERS, adopted, feed, node_of, play, said


def test_a_server_whose_k3s_is_stopped_for_a_while_stays_a_member() -> None:
    wire = play(THREE_SERVERS)
    assert node_of(wire, "b").phase is NodePhase.READY
    feed(wire, "b", K3sState(detail="its server does not answer"))
    play("go 280s", wire)
    assert "b" in wire._kube.nodes
    order = wire.machines["b"].order
    assert order is not None
    assert (order.action, order.attempt) == (Action.JOIN, 0)
    # Root looks again: perhaps it was removed from etcd, and waits for its data to go aside.
    play("go 40s", wire)
    order = wire.machines["b"].order
    assert order is not None
    assert (order.action, order.attempt) == (Action.JOIN, 1)
    play("apply b done\nprobed b\ndeliver", wire)
    assert node_of(wire, "b").phase is NodePhase.READY


def test_one_probe_that_fails_orders_nothing() -> None:
    wire = play(
        "site a b nodes=2 servers=1\non a b\nmeet a b\ndeliver\napply a done\nprobed a\ndeliver"
    )
    assert node_of(wire, "a").phase is NodePhase.READY
    before = wire.machines["a"].order
    feed(wire, "a", K3sState(detail="its server does not answer (no answer in time)"))
    play("go 60s", wire)
    assert wire.machines["a"].order == before


def test_a_roster_of_an_earlier_life_of_the_site_is_nobodys() -> None:
    wire = play(f"site a b c nodes=3\ndisk a etcd {CA}\ndisk b etcd {CA}\ndisk c etcd {CA}")
    old = NodeId("old")
    wire._kube.version = 7
    wire._kube.roster = Roster(revision=3, servers=(old, NodeId("olda")), init=old)
    play("on a b c\nmeet a b c\ndeliver\ngo 10s", wire)
    first = next(name for name, m in wire.machines.items() if m.order is not None)
    play(f"apply {first} done\nready {first}\ndeliver\ngo 5s", wire)
    for name in "abc":
        if name != first:
            play(f"apply {name} done\nready {name}", wire)
    play("go 400s", wire)
    assert [node_of(wire, name).phase for name in "abc"] == [NodePhase.READY] * 3
    assert [node_of(wire, name).roster.servers for name in "abc"] != [old]


def test_a_daemon_that_is_silent_does_not_hold_up_the_place_of_a_dead_server() -> None:
    wire = play(THREE_SERVERS + "\noff c")
    heard = wire._kube.is_ready

    def is_ready(kube: KubeNode) -> bool:
        return kube.name == "c" or heard(kube)

    wire._kube.is_ready = is_ready
    play("go 700s\noff b\ngo 300s", wire)
    assert "power on" not in str(status.notes(node_of(wire, "a"), wire.now_s))
    play("go 900s", wire)
    assert wire._kube.roster is not None
    assert set(wire._kube.roster.servers) == {"a", "c", "d"}


def test_a_machine_that_goes_off_each_time_k3s_starts_is_not_the_init_node_for_ever() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\ngo 10s")
    for _ in range(7):
        play("off a\ngo 5s\non a\nmeet a b c\ngo 20s", wire)
    (_, abandoned, *_) = node_of(wire, "b").log
    assert "K3s was started here 5 times" in abandoned.describe()


def test_an_adopted_server_that_the_roster_does_not_know_is_one() -> None:
    wire = adopted("abc", "a b c m n")
    assert wire._kube.roster is not None
    play("on c\nmeet a b n c\ngo 20s", wire)
    order = wire.machines["c"].order
    assert order is not None
    assert (order.action, order.role) == (Action.JOIN, ServerOrAgent.SERVER)
    play("apply c done\nready c\ngo 400s", wire)
    assert node_of(wire, "c").phase is NodePhase.READY


def test_a_ballot_that_cannot_have_a_value_is_not_written_twice_a_minute() -> None:
    wire = play(
        f"site a b c d e nodes=5 servers=3\nrole e agent\ndisk e etcd {CA}\non a b c d e\n"
        "meet a b c d e\ngo 1200s"
    )
    lines = wire.shown()
    assert "e, which has K3s data of a cluster, to be able to lead" in said(wire, "a")
    play("go 3600s", wire)
    written = sum("persist " in line for line in wire.shown())
    assert lines
    assert written / 5 < 60


ENTERING = f"""\
{THREE_SERVERS}
role d server
off d
on d
meet a b c d
ready d
deliver
go 4s"""
"""d was asked to be a server; root has not prepared it yet."""


def test_a_server_that_dies_while_it_takes_over_is_struck_out() -> None:
    """Else etcd has four members for good, of which one is dead."""
    wire = play(f"{ENTERING}\napply d done\ndeliver\ngo 4s\napply d done\ngo 4s")
    assert node_of(wire, "a").roster.servers == ("a", "b", "c", "d")
    order = wire.machines["d"].order
    assert order is not None
    assert (order.action, order.role) == (Action.JOIN, ServerOrAgent.SERVER)
    play("off d\ngo 290s", wire)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c", "d")
    play("go 400s", wire)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c")


def test_who_is_not_to_take_over_any_more_is_struck_out() -> None:
    wire = play(ENTERING)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c", "d")
    play("role d agent\noff d\non d\nmeet a b c d\ndeliver\ngo 2100s", wire)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c")


def test_who_was_not_heard_for_longest_makes_room() -> None:
    wire = play(THREE_SERVERS)
    a = wire.machines["a"]
    node = node_of(wire, "a")
    (hello, *_) = (peer.hello for peer in node.peers.values())
    crowd = {
        NodeId(f"x{n}"): Peer(
            hello=replace(hello, node=NodeId(f"x{n}")), up=False, heard_s=0.0, lost_s=float(n)
        )
        for n in range(PEERS_LIMIT - len(node.peers))
    }
    a.node = node.but(peers={**node.peers, **crowd})
    play("on e\nmeet a e\ngo 1s", wire)
    peers = node_of(wire, "a").peers
    assert len(peers) == PEERS_LIMIT
    assert NodeId("e") in peers
    assert NodeId("x0") not in peers


@pytest.mark.parametrize("name", ["b", "c"])
def test_probes_count_for_what_is_on_the_disk(name: str) -> None:
    wire = play(THREE_SERVERS)
    facts = node_of(wire, name).facts
    assert facts is not None
    assert facts.datastore is Datastore.ETCD


def test_a_server_of_another_cluster_is_none_of_the_sites() -> None:
    wire = play(THREE_SERVERS)
    assert guards.conflict(node_of(wire, "b")) is None
    assert server_url(node_of(wire, "b")) is not None
    feed(wire, "b", K3sState(running=True, ready=True, ca_hash="b0" * 32, detail="ready"))
    assert server_url(node_of(wire, "b")) is None


def test_k3s_that_its_unit_started_holds_data() -> None:
    """After a power cut just after ``apply``: the disk was looked at before K3s had begun."""
    wire = play(THREE_SERVERS)
    play("off d\non d\nmeet a b c d", wire)
    d = wire.machines["d"]
    assert node_of(wire, "d").facts == Facts(fsync_ms=1.0)
    assert d.order is None
    assert not guards.holds_data(node_of(wire, "d"))
    feed(wire, "d", K3sState(running=True, ready=True, detail="ready"))
    assert guards.holds_data(node_of(wire, "d"))


def test_an_adopted_server_that_no_roster_lists_may_reboot() -> None:
    wire = adopted("abcd", "a b c d m n e")
    play(
        "on c d\nmeet a b n c d\ngo 20s\napply c done\nready c\napply d done\nready d\ngo 400s",
        wire,
    )
    assert wire._kube.roster is not None
    assert "c" not in wire._kube.roster.servers
    play("off c\ngo 45s\non e\nmeet a b n d e\ngo 60s", wire)
    assert "c" in wire._kube.nodes
