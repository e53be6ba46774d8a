# SPDX-License-Identifier: Apache-2.0
"""What is said of servers that are gone. Each was a bug."""

from dataclasses import replace

from k3sagentd.core import outage
from k3sagentd.core.events import HelloReceived
from k3sagentd.core.k3s import Datastore, Facts, K3sState, ServerOrAgent
from tests.sim.scenes import CA, THREE_SERVERS, feed, node_of, play, said

ONLY = (
    "a, the cluster's only server, not heard for 5 min: power it on; or, if its disk is lost for "
    "good, k3sagentd cluster-init --force on another machine starts a new, empty cluster"
)


def test_founding_servers_that_never_joined_have_no_cluster() -> None:
    wire = play(
        "site a b c d nodes=4 servers=3\non a b c d\nmeet a b c d\ndeliver\napply a done\n"
        "probed a\ndeliver\napply b done\ngo 10s\noff a\ngo 310s"
    )
    assert node_of(wire, "b").roster.servers == ("a", "b", "c")
    assert [said(wire, name) for name in "bcd"] == [ONLY] * 3
    # A daemon that began since has heard of nobody but those here.
    play("off d\non d\nmeet b c d\ngo 310s", wire)
    assert said(wire, "d") == ONLY


def test_servers_that_come_back_with_empty_disks_are_no_quorum() -> None:
    wire = play(THREE_SERVERS + "\noff b c")
    feed(wire, "a", K3sState(running=True, detail="etcd has no quorum"))
    counts = "1 of etcd's 3 servers here, 2 must be, or the cluster takes no changes: "
    assert outage.quorum_lost(node_of(wire, "a")) == f"{counts}power on 1 of b, c"
    play("on c\nmeet a c d\ngo 20s", wire)
    assert outage.quorum_lost(node_of(wire, "a")) == f"{counts}power on b"
    play("on b\nmeet a b c d\ngo 20s", wire)
    assert outage.quorum_lost(node_of(wire, "a")) == (
        f"{counts}the data of b, c is lost; see «etcd lost its quorum» in "
        "/usr/share/doc/k3sagentd/operations.md"
    )


def test_servers_that_were_installed_anew_are_not_asked_for() -> None:
    wire = play(THREE_SERVERS + "\noff b c\nsite e f nodes=4")
    for new, old in (("e", "b"), ("f", "c")):
        wire.machines[new].site = replace(
            wire.machines[new].site, hardware=wire.machines[old].site.hardware
        )
    play("on e f\nmeet a d e f\ngo 1s", wire)
    feed(wire, "a", K3sState(running=True, detail="etcd has no quorum"))
    assert "the data of b, c is lost" in str(outage.quorum_lost(node_of(wire, "a")))


def test_who_heard_of_no_server_says_nothing_of_etcd() -> None:
    wire = play(THREE_SERVERS)
    agent = Facts(fsync_ms=1.0, datastore=Datastore.AGENT, ca_hash=CA)
    wire.machines["d"].facts = agent
    play("off a b c d\non d\ngo 1s\napply d done", wire)
    assert outage.quorum_lost(node_of(wire, "d")) is None
    assert said(wire, "d") == "K3s on this machine to be ready: K3s is not running"


def test_a_server_that_became_an_agent_is_no_member_when_it_is_listed_again() -> None:
    wire = play(THREE_SERVERS)
    hello = next(hello for hello in node_of(wire, "a").up if hello.node == "c")
    for changed in (
        replace(hello, revision=900, member=False, server_url=None, k3s_role=ServerOrAgent.AGENT),
        replace(hello, revision=901, member=False, server_url=None),
    ):
        wire._feed(wire.machines["a"], HelloReceived(now_s=wire.now_s, hello=changed))
    play("off b", wire)
    feed(wire, "a", K3sState(running=True, detail="etcd has no quorum"))
    assert "1 of etcd's 2 servers" in str(outage.quorum_lost(node_of(wire, "a")))
