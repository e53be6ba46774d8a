# SPDX-License-Identifier: Apache-2.0
"""A cluster that was heard of is not founded anew while its machines are off. Each was a bug."""

from collections.abc import Iterable

from k3sagentd.core import guards
from k3sagentd.core.k3s import Action, Datastore, Facts
from k3sagentd.core.log import Nominate
from k3sagentd.core.words import NodeId
from tests.sim.scenario import Wire
from tests.sim.scenes import CA, node_of, play, said

AGENT = Facts(fsync_ms=1.0, datastore=Datastore.AGENT, ca_hash=CA)


def ordered(wire: Wire, names: Iterable[str]) -> set[Action]:
    orders = (wire.machines[name].order for name in names)
    return {order.action for order in orders if order is not None}


def nominated(wire: Wire, by: str) -> list[str]:
    return [value.init for value in node_of(wire, by).log if isinstance(value, Nominate)]


def test_nobody_is_nominated_while_who_has_a_cluster_is_off() -> None:
    wire = play(
        f"site a b c d e nodes=5 servers=3\nrole e agent\ndisk e etcd {CA}\non a b c d e\n"
        "meet a b c d e\ngo 600s\noff e\ngo 1200s"
    )
    assert not ordered(wire, "abcd")
    assert said(wire, "a").startswith("e, which has K3s data of a cluster, to be on again")
    play("role e auto\non e\nmeet a b c d e\ndeliver\ngo 700s", wire)
    assert set(nominated(wire, "a")) == {"e"}


def test_an_abandoned_nominee_with_a_cluster_is_waited_for() -> None:
    wire = play(f"site a b c nodes=3 servers=1\ndisk c etcd {CA}\non a b c\nmeet a b c\ndeliver")
    play("off c\ngo 900s", wire)
    assert len(node_of(wire, "a").log) == 2
    assert not ordered(wire, "ab")
    play("on c\nmeet a b c\ndeliver\ngo 900s", wire)
    assert set(nominated(wire, "a")) == {"c"}
    assert len(nominated(wire, "a")) > 1


def test_who_was_reset_is_not_missed() -> None:
    wire = play(
        f"site a b c d nodes=3\ndisk c etcd {CA}\nrole c agent\non a b c\nmeet a b c\ngo 60s\n"
        "off c\ngo 120s"
    )
    new, old = wire.machines["d"], wire.machines["c"]
    new.site = old.site
    play("role d auto\non d\nmeet a b d\ndeliver\ngo 900s", wire)
    assert nominated(wire, "a")


def test_who_has_not_heard_of_a_cluster_is_not_voted_for_by_who_has() -> None:
    wire = play(
        f"site a b c d nodes=3\ndisk c etcd {CA}\nrole c agent\non a b c\nmeet a b c\ngo 60s\n"
        "off c\ngo 120s\non d\nmeet a b d\ndeliver\ngo 900s"
    )
    assert not nominated(wire, "a")
    assert "waits for c, which has K3s data of a cluster, to be on again" in said(wire, "d")


def test_an_agent_votes_for_its_own_cluster_alone() -> None:
    wire = play(f"site a b c nodes=3\ndisk c etcd {CA}\non a b c\nmeet a b c")
    a = node_of(wire, "a").but(facts=AGENT)

    def refused(init: str) -> str | None:
        founder = NodeId(init)
        return guards.foreign_nomination(a, Nominate(init=founder, servers=(founder,)))

    assert refused("c") is None
    for other in "ab":
        assert refused(other) == "is an agent of a cluster that the nominated node has not"


def test_agents_found_no_cluster_beside_theirs() -> None:
    wire = play("site a b c d nodes=4 servers=3")
    for name in "ab":
        wire.machines[name].facts = AGENT
    play(f"disk d etcd {CA}\non a b c\nmeet a b c\ndeliver\ngo 900s", wire)
    assert not ordered(wire, "abc")
    assert said(wire, "c").startswith("a server of the cluster that ")
    play("on d\nmeet a b c d\ndeliver\ngo 900s", wire)
    assert set(nominated(wire, "a")) == {"d"}


def test_an_init_node_of_before_starts_nothing_beside_a_forced_one() -> None:
    wire = play("site a b c nodes=3 servers=1\non a b c\nmeet a b c\ndeliver\ngo 4s")
    assert ordered(wire, "a") == {Action.INIT}
    play("off a\ngo 5s\nforce b\ndeliver", wire)
    wire.machines["a"].order = None
    play("on a\nmeet a b c\ndeliver\ngo 5s", wire)
    assert ordered(wire, "ab") == {Action.INIT}
    assert wire.machines["a"].order is None
    play("apply b done\nready b\ndeliver\ngo 60s", wire)
    assert said(wire, "a") == (
        "a person: b was forced to start a new cluster, and this machine was to start the one "
        "before; k3sagentd reset here gives that up and joins the new one"
    )


def test_an_init_node_that_prepares_hears_of_a_forced_start() -> None:
    wire = play(
        "site a b c nodes=3 servers=1\non a b c\nmeet a b c\ndeliver\napply a done\nready a\n"
        "deliver\ngo 5s\noff a b c\ndisk a none\non b c\nmeet b c\nforce b\ngo 1s\n"
        "apply b done\nready b\ndeliver\ngo 10s\non a\ngo 5s"
    )
    order = wire.machines["a"].order
    assert order is not None
    assert order.action is Action.PREPARE
    play("apply a done\ngo 5s\nmeet a b c\ndeliver\ngo 60s", wire)
    assert said(wire, "a").startswith("a person: b was forced to start a new cluster, and this")
