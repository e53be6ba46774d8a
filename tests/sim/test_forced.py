# SPDX-License-Identifier: Apache-2.0
"""Who may start a cluster alone, and who may not even by force. Each was a bug."""

from dataclasses import replace

import pytest

from k3sagentd.core import guards, status
from k3sagentd.core.events import HelloReceived, MessageReceived
from k3sagentd.core.k3s import Datastore, Facts, K3sState, ServerOrAgent
from k3sagentd.core.log import Nominate
from k3sagentd.core.messages import Learned
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.scenario import Wire
from tests.sim.scenes import CA, THREE_SERVERS, feed, node_of, play, said


def test_no_force_beside_a_server_that_only_waits_for_its_quorum() -> None:
    wire = play(THREE_SERVERS + "\noff a\noff c")
    feed(wire, "b", K3sState(running=True, detail="etcd has no quorum"))
    play("on e\nmeet b d e\ngo 20s", wire)
    refused = guards.why_not_force(node_of(wire, "e"))
    assert refused == "b has a cluster's data; bring it up there, or k3sagentd reset it first"


def test_a_forced_start_that_fails_waits_for_no_votes() -> None:
    wire = play("site a b c nodes=3\non a\nforce a\napply a hopeless")
    assert said(wire, "a").startswith("init failed at ")


def test_a_clone_starts_nothing_though_its_twin_was_nominated() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\nclone a")
    nominated = Nominate(init=NodeId("a"), servers=(NodeId("a"),))
    learned = Learned(first=0, entries=(nominated,), nodes=3)
    a = wire.machines["a"]
    wire._feed(a, MessageReceived(now_s=wire.now_s, sender=NodeId("b"), message=learned))
    assert node_of(wire, "a").phase is NodePhase.INITIALISING
    assert a.order is None
    assert said(wire, "a").startswith("a person: another live machine has this node's identity")


def test_no_start_is_forced_on_a_clone() -> None:
    """Its twin would take that start for its own, and lead as well."""
    wire = play("site a b c nodes=3\non a\nclone a")
    refused = str(guards.why_not_force(node_of(wire, "a")))
    assert refused.endswith("what is forced on one would be the other's start as well")
    wire = play(f"site a b c nodes=3\ndisk a sqlite {CA}\non a\nclone a")
    assert guards.why_not_force(node_of(wire, "a")) is not None, "all would wait for it for ever"


def test_no_force_while_an_abandoned_start_is_put_aside() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\ngo 10s\napply a hopeless\ngo 30s")
    assert node_of(wire, "a").phase is NodePhase.STANDING_DOWN
    assert "put aside" in str(guards.why_not_force(node_of(wire, "a")))


def test_who_has_the_only_cluster_and_lost_its_votes_starts_the_site_by_force() -> None:
    """It was told to reset, which would have deleted the cluster."""
    wire = play(f"site a b c nodes=3 servers=1\ndisk c etcd {CA}\nforget c\non a b c")
    assert "reset" not in said(wire, "c")
    play("meet a b c\ndeliver\ngo 60s", wire)
    remedy = "k3sagentd cluster-init --force"
    assert said(wire, "c").endswith(f"{remedy} here starts the site with the cluster it has")
    assert said(wire, "a") == (
        "c, which has K3s data of a cluster but may not vote, to start the site: see k3sagentd "
        "status there"
    )
    play("force c\ndeliver\napply c done\nready c\ndeliver\ngo 10s\napply a done\nready a", wire)
    assert node_of(wire, "c").phase is NodePhase.READY
    assert node_of(wire, "a").phase is NodePhase.READY
    assert "votes are lost" not in "".join(status.notes(node_of(wire, "c"), wire.now_s))


def test_a_start_that_was_forced_and_is_done_is_not_forced_again() -> None:
    wire = play("site a b c nodes=3 servers=1\non a b\nforce a\nforce a\napply a done\nready a")
    before = node_of(wire, "a").durable
    assert before.generation.number == 1
    assert guards.why_not_force(node_of(wire, "a")) is None
    play("force a\ngo 10s", wire)
    assert node_of(wire, "a").durable == before
    # Its disk was lost: that is another cluster.
    play("off a\ndisk a none\non a\nforce a", wire)
    assert node_of(wire, "a").generation.number == 2


def test_who_lost_its_votes_is_not_reset_alone() -> None:
    """It may be one of the two that sealed the site: the other would find a quorum that was not."""
    wire = play("site a b c nodes=3\nforget c\non c")
    advice = "none of its machines has a cluster: k3sagentd reset on all of them"
    assert f" and {advice}; 1 of 3 machines here" in said(wire, "c")


def three_with_data() -> Wire:
    """Three servers and what root finds on their disks, all off."""
    wire = play(THREE_SERVERS)
    for name in "abc":
        facts = Facts(fsync_ms=1.0, datastore=Datastore.ETCD, ca_hash=CA, told_name=name)
        if name == "a":
            facts = replace(facts, origin=0, origin_node=NodeId("a"))
        wire.machines[name].facts = facts
    return play("off a b c d", wire)


SAME_CA = " was forced to start a cluster with the CA of this machine's; if it is the same: "


@pytest.mark.parametrize("forced", ["a", "c"])
def test_a_server_of_this_site_that_lost_its_votes_waits_for_the_others(forced: str) -> None:
    """It was told to force a start, and the healthy ones to give their cluster up."""
    wire = play(f"forget {forced}\non {forced}\ngo 5s", three_with_data())
    waits = "it waits for the other machines of its site; 1 of 4 machines here"
    assert waits in said(wire, forced)
    # Forced all the same, with others that follow it: whether it is one cluster, nobody can tell.
    play(f"force {forced}\ngo 1s\napply {forced} done\non e\nmeet {forced} e\ndeliver", wire)
    other = "b"
    play(f"on {other}\nmeet {forced} {other} e\ndeliver\ngo 5s", wire)
    assert said(wire, other).startswith(f"a person: {forced}{SAME_CA}")
    feed(wire, forced, K3sState(running=True, ready=True, ca_hash=CA, detail="ready"))
    play(f"deliver\ngo 60s\noff {forced}\ngo 60s", wire)
    assert said(wire, other).startswith(f"a person: {forced}{SAME_CA}")


def test_the_same_ca_is_not_the_same_etcd() -> None:
    """Its servers had followed a new, empty cluster whose first machine had kept the CA."""
    wire = three_with_data()
    wire.machines["a"].facts = Facts(fsync_ms=1.0, ca_hash=CA)
    play("on a\ngo 5s\nforce a\ngo 1s\napply a done", wire)
    feed(wire, "a", K3sState(running=True, ready=True, ca_hash=CA, detail="ready"))
    play("on e\nmeet a e\ndeliver\ngo 20s\non b c\nmeet a b c e\ndeliver\ngo 300s", wire)
    for name in "bc":
        assert node_of(wire, name).generation.number == 0
        assert node_of(wire, name).phase is NodePhase.CONFLICT
        order = wire.machines[name].order
        assert order is None or (order.generation, order.role) == (0, ServerOrAgent.SERVER)


def test_an_agent_that_lost_its_votes_waits_for_its_servers() -> None:
    """It was told to reset all machines, servers among them."""
    wire = three_with_data()
    agent = Facts(fsync_ms=1.0, datastore=Datastore.AGENT, ca_hash=CA, told_name="d")
    wire.machines["d"].facts = agent
    play("forget d\non d\ngo 5s", wire)
    assert "; it waits for a server of its cluster; 1 of 4" in said(wire, "d")


def test_of_two_servers_that_lost_their_votes_either_starts_their_cluster() -> None:
    """Each named the other as what stood in the way, to be reset."""
    disks = f"disk b etcd {CA}\ndisk c etcd {CA}\nforget c\nforget b"
    wire = play(f"site a b c nodes=3 servers=3\n{disks}\non a b c\nmeet a b c\ngo 60s")
    assert [guards.why_not_force(node_of(wire, name)) for name in "bc"] == [None] * 2
    assert guards.why_not_force(node_of(wire, "a")) is not None


def test_a_machine_that_is_the_whole_site_starts_its_own_cluster_by_force() -> None:
    wire = play("site a nodes=1\non a\ngo 11s\napply a done\nready a\ndeliver\ngo 5s")
    facts = node_of(wire, "a").facts
    assert facts is not None
    wire.machines["a"].facts = facts
    play("off a\nforget a\non a\ngo 5s", wire)
    assert "k3sagentd cluster-init --force here starts the site" in said(wire, "a")
    play("force a\ngo 1s", wire)
    order = wire.machines["a"].order
    assert order is not None
    # As root's marker beside the data says; else it would not touch it.
    assert (order.generation, order.epoch) == (facts.origin_generation, facts.origin)


def test_another_ca_is_not_taken_for_another_cluster_where_k3s_is_ours() -> None:
    wire = play(THREE_SERVERS)
    facts = Facts(fsync_ms=1.0, datastore=Datastore.ETCD, ca_hash="c2" * 32, told_name="b")
    wire.machines["b"].facts = facts
    play("off b\non b\nmeet a b c d\ngo 5s", wire)
    assert node_of(wire, "b").phase is NodePhase.CONFLICT
    assert "k3s-uninstall" not in said(wire, "b")


def test_who_lost_its_votes_waits_for_its_cluster() -> None:
    wire = play(f"site a b c nodes=3 servers=1\ndisk c etcd {CA}\ndisk b etcd {CA}\nforget c")
    play("on b c\nmeet b c\ngo 1s", wire)
    assert not {"reset", "--force"} & set(said(wire, "c").split())


def test_what_a_clone_said_before_it_stopped_is_not_believed_after() -> None:
    """Its twin's hello in between made the older one look new, and its epoch was waited for."""
    wire = play("site a b c nodes=3\non a b\nmeet a b")
    hello = next(hello for hello in node_of(wire, "a").up if hello.node == "b")
    for instance, revision, may_vote in (
        ("twin", 1, True),
        (hello.instance, 9, False),
        ("twin", 2, False),
        (hello.instance, 8, True),
    ):
        said_by = replace(hello, instance=instance, revision=revision, may_vote=may_vote)
        wire._feed(wire.machines["a"], HelloReceived(now_s=wire.now_s, hello=said_by))
    assert not node_of(wire, "a").peers[NodeId("b")].able
