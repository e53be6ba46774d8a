# SPDX-License-Identifier: Apache-2.0
"""Late machines that would be a quorum by themselves: they look for a cluster before they are all
there is. Each was a bug."""

from dataclasses import replace

import pytest

from k3sagentd.core import machine
from k3sagentd.core.effects import Send
from k3sagentd.core.events import AddressChanged, MessageReceived, ResultRead
from k3sagentd.core.k3s import Action, Datastore, Facts, Outcome, Result
from k3sagentd.core.log import Abandon, Nominate
from k3sagentd.core.messages import Accept, Intent, Learned, Prepare
from k3sagentd.core.paxos import Ballot
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.scenario import Wire
from tests.sim.scenes import node_of, play, said
from tests.sim.test_promise import site, until


def attached(wire: Wire, names: str) -> None:
    """The network is there only now."""
    for name in names:
        address = f"10.0.9.{ord(name)}"
        wire._feed(wire.machines[name], AddressChanged(now_s=wire.now_s, address=address))


def actions(wire: Wire, names: str) -> list[Action | None]:
    orders = [wire.machines[name].order for name in names]
    return [order.action if order is not None else None for order in orders]


def test_who_is_a_quorum_alone_looks_at_the_network_first() -> None:
    wire = play("site a b nodes=1\non a\ngo 11s\napply a done\nprobed a\ndeliver\non b\ngo 9s")
    assert actions(wire, "b") == [None]
    assert said(wire, "b") == (
        "nobody to be heard: looks for a cluster that is there already, 1 s more"
    )
    play("meet a b\ndeliver\ngo 30s", wire)
    assert actions(wire, "b") == [Action.JOIN]


def test_without_a_network_nobody_is_alone_on_it() -> None:
    wire = play("site a nodes=1\non a")
    wire._feed(wire.machines["a"], AddressChanged(now_s=wire.now_s, address=None))
    play("go 600s", wire)
    assert node_of(wire, "a").phase is NodePhase.DISCOVERING
    attached(wire, "a")
    play("go 9s", wire)
    assert actions(wire, "a") == [None]
    play("go 2s", wire)
    assert actions(wire, "a") == [Action.INIT]


def test_a_cable_that_is_not_plugged_in_is_no_network() -> None:
    """An address that is configured is there before the switch is."""
    wire = play("site a nodes=1\non a")

    def carrier(there: bool) -> None:
        address = node_of(wire, "a").address
        event = AddressChanged(now_s=wire.now_s, address=address, carrier=there)
        wire._feed(wire.machines["a"], event)

    carrier(False)
    play("go 600s", wire)
    assert actions(wire, "a") == [None]
    assert said(wire, "a").startswith("a network: its interface has no carrier")
    carrier(True)
    play("go 9s", wire)
    carrier(True)
    assert actions(wire, "a") == [None]
    play("go 2s", wire)
    assert actions(wire, "a") == [Action.INIT]


def test_as_many_late_machines_as_elect_hear_of_the_cluster_first() -> None:
    wire = play(
        "site a b c d e f nodes=3 servers=1\non a b c\nmeet a b c\ndeliver\napply a done\n"
        "probed a\ndeliver"
    )
    for name in "def":
        wire.machines[name].site = replace(wire.machines[name].site, look_s=1.0)
    play("on d e f\ngo 60s\nmeet d e f\ndeliver\ngo 0.9s", wire)
    assert actions(wire, "def") == [None] * 3, "the others may be a moment behind"
    play("meet a d e f\ndeliver\ngo 30s", wire)
    assert actions(wire, "def") == [Action.JOIN] * 3
    assert len({node.ca_hash for name in "adef" if (node := node_of(wire, name).seal)}) == 1


@pytest.mark.parametrize(("nodes", "late"), [(1, 1), (1, 3), (2, 2), (3, 3), (3, 10)])
def test_late_machines_join_though_they_are_a_quorum(nodes: int, late: int) -> None:
    world = site(nodes)
    until(world, lambda: world.complete)
    for _ in range(late):
        world.power_on(world.add(world.plan.machines[0]))
    until(world, lambda: world.complete)
    assert len(world.computers) == nodes + late
    assert len(world.promise.founded) == 1


SEALED = (
    "site a b c d e f nodes=3 servers=1\non a b c\nmeet a b c\ndeliver\napply a done\nprobed a\n"
    "deliver\napply b done\napply c done\nprobed b\nprobed c\ngo 5s\n"
)
ANOTHER_LOG = "a person: a is of a site that is sealed, and this machine had begun another one"


def test_a_sealed_log_takes_no_more_entries() -> None:
    """Machines that began elsewhere and gave up took a ready site into a second cluster."""
    wire = play(SEALED + "on d e f\nmeet d e f\ndeliver\ngo 5s\napply f hopeless\ngo 60s")
    play("apply f done\ngo 0.2s", wire)
    before = node_of(wire, "a").log
    assert len(node_of(wire, "d").log) > len(before)
    play("meet a b c d e f\ndeliver\ngo 300s", wire)
    for name in "abc":
        assert node_of(wire, name).log == before
        assert node_of(wire, name).phase is NodePhase.READY
    for name in "def":
        assert said(wire, name).startswith(ANOTHER_LOG)
    assert actions(wire, "def") == [Action.INIT, None, Action.STAND_DOWN], "as it was before"


def test_one_that_gave_up_alone_leaves_a_ready_server_in_peace() -> None:
    """It was told to stand down: the log of the one had an epoch more for the other."""
    wire = play("site a b nodes=1\non a\ngo 11s\napply a done\nprobed a\ndeliver\non b\ngo 11s")
    play("apply b hopeless\ngo 1s\napply b done\ngo 1s\nmeet a b\ndeliver\ngo 300s", wire)
    assert node_of(wire, "a").phase is NodePhase.READY
    assert actions(wire, "a") == [Action.INIT]
    assert said(wire, "b").startswith(ANOTHER_LOG)


def test_one_that_began_alone_does_not_join_half() -> None:
    """It took the seal after its own nomination, and waited for a place that nobody kept."""
    wire = play("site a b nodes=1\non a\ngo 11s\napply a done\nprobed a\ndeliver\non b\ngo 11s")
    play("meet a b\ndeliver\ngo 300s", wire)
    assert node_of(wire, "b").phase is NodePhase.CONFLICT
    assert said(wire, "b").endswith("two sites share this token")
    assert node_of(wire, "a").phase is NodePhase.READY


def test_no_message_adds_to_a_sealed_log() -> None:
    wire = play(SEALED)
    a = node_of(wire, "a")
    ballot = Ballot(round=9, node=NodeId("d"))
    nominate = Nominate(init=NodeId("d"), servers=(NodeId("d"),))
    for message in (
        Prepare(decree=2, ballot=ballot, intent=Intent.NOMINATE, nodes=3),
        Accept(decree=2, ballot=ballot, value=nominate, nodes=3),
        Learned(first=2, entries=(nominate,), nodes=3),
    ):
        event = MessageReceived(now_s=wire.now_s, sender=NodeId("d"), message=message)
        after, effects = machine.step(a, event)
        assert after.durable == a.durable
        answers = [effect.message for effect in effects if isinstance(effect, Send)]
        assert all(isinstance(each, Learned) and each.entries == a.log for each in answers)


BEGAN = SEALED + (
    "on d e f\nmeet d e f\ndeliver\ngo 5s\napply f hopeless\ngo 60s\napply f done\ngo 0.2s"
)


def test_who_heard_of_a_sealed_site_goes_on_with_no_other() -> None:
    """It was forgotten with the wire, and they sealed a second one."""
    wire = play(f"{BEGAN}\nmeet a b c d e f\ndeliver\ngo 100s")
    play("\n".join(f"part {one} {other}" for one in "abc" for other in "def"), wire)
    play("go 60s\napply d done\nready d\ndeliver\ngo 600s", wire)
    assert [node_of(wire, name).phase for name in "def"] == [NodePhase.CONFLICT] * 3
    assert [node_of(wire, name).seal for name in "def"] == [None] * 3


def test_who_heard_of_a_sealed_site_founds_no_other() -> None:
    """It went off before its log was read."""
    wire = play(SEALED + "on d e f\nmeet d e f\ngo 0.2s\nmeet a d e f")
    wire.flight.clear()
    play("off a\ngo 600s", wire)
    assert actions(wire, "def") == [None] * 3
    assert said(wire, "d").startswith("a, which has K3s data of a cluster, to be on again")


def test_another_log_is_noticed_once() -> None:
    wire = play("site a b nodes=1\non a\ngo 11s\napply a done\nprobed a\ndeliver\non b\ngo 11s")
    wire.shown()
    play("meet a b\ndeliver\ngo 300s", wire)
    lines = wire.shown()
    assert len([line for line in lines if "two sites share this token" in line]) == 1
    assert len([line for line in lines if "fetch" in line]) == 1


def test_a_sealed_machine_is_not_in_conflict_by_anothers_log() -> None:
    """It would have waited for a person after its next restart."""
    wire = play(SEALED)
    began = (Nominate(init=NodeId("f"), servers=(NodeId("f"),)), Abandon(reason="no disk"))
    message = Learned(first=0, entries=began, nodes=3)
    event = MessageReceived(now_s=wire.now_s, sender=NodeId("f"), message=message)
    wire._feed(wire.machines["a"], event)
    assert node_of(wire, "a").split is None


def test_nobody_is_told_to_reset_what_has_a_cluster_of_its_own() -> None:
    wire = play(SEALED)
    wire.machines["f"].facts = Facts(
        fsync_ms=1.0, datastore=Datastore.ETCD, ca_hash="f6" * 32, node_name="f"
    )
    play("on d e f\nmeet d e f\ndeliver\ngo 5s\napply f hopeless\ngo 60s", wire)
    f = wire.machines["f"]
    assert f.order is not None
    done = Result(order=f.order, outcome=Outcome.DONE, step="it was not ours")
    wire._feed(f, ResultRead(now_s=wire.now_s, result=done))
    play("go 2s\nmeet a b c d e f\ndeliver\ngo 30s", wire)
    assert "this machine has a cluster of its own (CA f6f6f6f6f6f6)" in said(wire, "f")
    assert "reset" not in said(wire, "f")
