# SPDX-License-Identifier: Apache-2.0
"""Who may start a cluster alone, and who may not even by force. Each was a bug."""

from k3sagentd.core import guards
from k3sagentd.core.events import MessageReceived
from k3sagentd.core.k3s import K3sState
from k3sagentd.core.log import Nominate
from k3sagentd.core.messages import Learned
from k3sagentd.core.words import NodeId, NodePhase
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
    assert refused.endswith(
        "k3sagentd reset on one of them; on this one before its start is forced"
    )
    wire = play(f"site a b c nodes=3\ndisk a sqlite {CA}\non a\nclone a")
    assert guards.why_not_force(node_of(wire, "a")) is None, "a reset would cost its data"


def test_no_force_while_an_abandoned_start_is_put_aside() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\ngo 10s\napply a hopeless\ngo 30s")
    assert node_of(wire, "a").phase is NodePhase.STANDING_DOWN
    assert "put aside" in str(guards.why_not_force(node_of(wire, "a")))
