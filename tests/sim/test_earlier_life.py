# SPDX-License-Identifier: Apache-2.0
"""All identities are new over old data, where one marker is of an epoch of the earlier log."""

from dataclasses import replace

import pytest

from k3sagentd.core import guards
from k3sagentd.core.k3s import Action, Datastore, Facts
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.plan import calm
from tests.sim.scenario import Wire
from tests.sim.scenes import CA, node_of, play
from tests.sim.world import World

DATA = Facts(fsync_ms=1.0, datastore=Datastore.ETCD, ca_hash=CA)


def made(epoch: int, by: str | None) -> Facts:
    return replace(DATA, origin=epoch, origin_node=NodeId(by) if by else None)


def ordered(wire: Wire, name: str) -> Action | None:
    order = wire.machines[name].order
    return order.action if order else None


@pytest.mark.parametrize("by", [None, "old"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_three_servers_are_a_site_again(epoch: int, by: str | None) -> None:
    wire = play("site a b c nodes=3 servers=3")
    for name in "abc":
        wire.machines[name].facts = made(epoch, by) if name == "a" else DATA
    play("on a b c\nmeet a b c\ndeliver\ngo 10s", wire)
    assert [ordered(wire, name) for name in "abc"] == [Action.INIT, None, None]
    play("apply a done\nready a\ndeliver\ngo 10s", wire)
    assert node_of(wire, "a").seal is not None
    assert node_of(wire, "a").seal.ca_hash == CA
    assert [ordered(wire, name) for name in "abc"] == [Action.INIT, Action.JOIN, Action.JOIN]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_machine_alone_keeps_its_claim_through_an_abandoned_epoch(epoch: int) -> None:
    wire = play("site a nodes=1")
    wire.machines["a"].facts = made(epoch, "old")
    play("on a\ngo 10s\napply a hopeless\ngo 20s", wire)
    assert node_of(wire, "a").phase is NodePhase.STANDING_DOWN
    assert guards.existing_cluster(node_of(wire, "a")) == CA
    # Root leaves the data where it is, and says that it is done.
    m = wire.machines["a"]
    facts = m.facts
    play("apply a done", wire)
    m.facts = facts
    play("off a\non a\ngo 300s", wire)
    assert "  order init as server in epoch 1, attempt 1" in wire.shown(), "it may lead again"


def test_only_its_own_abandoned_epoch_takes_a_claim_away() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\ndeliver\ngo 10s\napply a hopeless")
    play("go 20s\ndeliver", wire)
    b = node_of(wire, "b")
    hello = next(each for each in b.up if each.node == "c")
    assert guards.claim(b, replace(hello, existing=CA, existing_epoch=0)) == CA
    old = replace(hello, existing=CA, existing_epoch=0, existing_by=NodeId("old"))
    assert guards.claim(b, old) == CA
    assert guards.claim(b, replace(old, existing_by=NodeId("a"))) is None


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_simulated_site_keeps_what_an_earlier_life_made(epoch: int) -> None:
    plan = calm(3)
    first, *rest = plan.machines
    first = replace(first, store=Datastore.ETCD, cluster="e" * 64, origin=epoch)
    world = World(replace(plan, machines=(first, *rest)))
    world.run(600.0)
    assert world.complete
    assert {m.k3s.cluster for m in world.computers} == {"e" * 64}


FOUR_OF_ONE_NAME = """\
on a b c d
meet a b c d
deliver
go 10s
apply a done
ready a
deliver
apply b done
apply c done
deliver
go 4s
apply b done
ready b
deliver
go 4s
apply c done
ready c
apply d done
ready d
deliver
go 60s"""


@pytest.mark.parametrize("name", ["a", "b", "d"])
@pytest.mark.parametrize("what", ["forget {}", "image {} z"])
def test_who_lost_its_state_is_the_node_that_it_was(name: str, what: str) -> None:
    """Under its bare hostname a live member would be another Node, and the old one one to clear."""
    wire = play("site a b c d nodes=4 servers=3")
    for m in wire.machines.values():
        m.site = replace(m.site, hostname="raspberrypi")
    play(FOUR_OF_ONE_NAME, wire)
    known = node_of(wire, name).durable.node_name
    assert known == f"raspberrypi-{name}"
    facts = node_of(wire, name).facts
    assert facts is not None
    play(f"off {name}\n{what.format(name)}", wire)
    now = "z" if what.startswith("image") else name
    wire.machines[now].facts = replace(facts, told_name=known)
    others = " ".join(each for each in "abcd" if each != name)
    play(f"on {now}\nmeet {others} {now}\ndeliver\ngo 5s", wire)
    order = wire.machines[now].order
    assert order is not None
    assert (order.action, order.node_name) == (Action.JOIN, known)
