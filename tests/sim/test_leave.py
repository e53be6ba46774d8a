# SPDX-License-Identifier: Apache-2.0
"""Who asks to leave is told what is so at that moment, not what K3s or the log still says."""

from dataclasses import replace

from k3sagentd.core import outage, steward
from k3sagentd.core.cluster import Errand, ErrandResult, KubeNode
from k3sagentd.core.k3s import Action, K3sState
from k3sagentd.core.state import Leaving
from k3sagentd.core.words import NodeId
from tests.sim.scenario import Wire
from tests.sim.scenes import CA, THREE_SERVERS, feed, node_of, play

TAKEN_OVER = f"""\
{THREE_SERVERS}
role c agent
off c
on c
meet a b c d
probed c
deliver
apply d done
deliver
go 4s
apply d done
ready d
deliver
go 3s"""
"""c is to be an agent; d is ready in its place, and c may stop."""


def slow_to_miss(wire: Wire, after_s: float = 40.0) -> None:
    """K3s calls a Node ready for so long after its machine stopped."""
    heard, last_s = wire._kube.is_ready, dict[str, float]()

    def is_ready(kube: KubeNode) -> bool:
        if heard(kube):
            last_s[kube.name] = wire.now_s
        return wire.now_s < last_s.get(kube.name, float("-inf")) + after_s

    wire._kube.is_ready = is_ready
    wire._kube.view()


def leaving_of(wire: Wire, name: str) -> Leaving:
    leaving = node_of(wire, name).leaving
    assert leaving is not None
    return leaving


def test_a_server_that_has_just_stepped_down_is_not_counted() -> None:
    """Of etcd's four members two would be left, for good, as three must live to remove one."""
    wire = play(TAKEN_OVER)
    slow_to_miss(wire)
    order = wire.machines["c"].order
    assert order is not None
    assert order.action is Action.STEP_DOWN
    play("apply c done\nleave b stop\ngo 6s", wire)
    assert not leaving_of(wire, "b").done
    assert "2 of the 3 servers that stay are ready (not counting c: K3s is not ready there)" in str(
        leaving_of(wire, "b").refused
    )
    play("go 60s\nleave b stop\ngo 10s", wire)
    assert "c" not in {kube.name for kube in wire._kube.nodes.values() if kube.server}
    assert leaving_of(wire, "b").done, "c's member is gone"


def test_a_server_that_has_just_gone_off_is_not_counted() -> None:
    wire = play(THREE_SERVERS)
    slow_to_miss(wire)
    play("off c\ngo 1s\nleave b stop\ngo 6s", wire)
    assert "not counting c: not heard just now" in str(leaving_of(wire, "b").refused)


def test_a_server_whose_daemon_alone_is_silent_is_counted() -> None:
    wire = play(THREE_SERVERS + "\npart a c\npart b c\npart d c\ngo 1s\nleave b stop\ngo 6s")
    assert leaving_of(wire, "b").refused, "it may have gone off just now"
    play("go 60s\nleave b stop\ngo 6s", wire)
    assert leaving_of(wire, "b").done, "K3s would have missed it by now"


def test_of_two_servers_that_leave_at_once_one_is_refused() -> None:
    wire = play(THREE_SERVERS)

    def drained(name: str) -> None:
        kube = wire._kube.nodes[name]
        wire._kube.nodes[name] = replace(kube, cordoned=True)

    play("leave b drain\ngo 1s", wire)
    drained("b")
    play("go 3s\nleave c drain\ngo 20s", wire)
    b, c = node_of(wire, "b").leaving, node_of(wire, "c").leaving
    assert b is not None
    assert b.done
    assert c is not None
    assert not c.done
    assert "1 of the 2 servers that stay are ready (not counting b: cordoned)" in str(
        c.refused or c.told
    )


def test_who_left_is_not_asked_for_when_etcd_has_no_quorum() -> None:
    wire = play(THREE_SERVERS + "\noff b\ngo 5s")
    del wire._kube.nodes["b"]
    node = node_of(wire, "a")
    look = replace(node.steward, view=wire._kube.view(), viewed_s=wire.now_s)
    wire.machines["a"].node = node.but(steward=look)
    play("go 5s\noff c\ngo 1s", wire)
    feed(wire, "a", K3sState(detail="its server does not answer"))
    lost = outage.quorum_lost(node_of(wire, "a"))
    assert lost is not None
    assert lost.startswith("1 of etcd's 2 servers here, 2 must be")
    assert lost.endswith("power on c")


def test_who_has_data_does_not_leave_unasked_because_its_log_is_lost() -> None:
    wire = play("site a b c nodes=3\ndisk a etcd " + CA + "\non a\nleave a stop\ngo 60s")
    leaving = node_of(wire, "a").leaving
    assert leaving is not None
    assert not leaving.done
    assert str(leaving.told).startswith("a peer that knows the site's cluster")
    wire = play("site a b c nodes=3\non a\nleave a stop\ngo 5s")
    leaving = node_of(wire, "a").leaving
    assert leaving is not None
    assert leaving.done, "it has nothing to leave"


def test_who_leaves_under_the_name_of_another_leaves_that_alone() -> None:
    wire = play(THREE_SERVERS)
    wire.machines["e"].site = replace(wire.machines["e"].site, hostname="d")
    play("on e\nmeet a b c e\ndeliver\ngo 20s", wire)
    asked: list[str] = []
    do = wire._kube.do

    def spy(errand: Errand) -> ErrandResult:
        asked.extend(each for each in (errand.drain, errand.remove) if each)
        return do(errand)

    wire._kube.do = spy
    for step in ("drain", "stop", "remove"):
        play(f"leave e {step}\ngo 20s", wire)
        assert leaving_of(wire, "e").refused == "the Node d is another machine's"
    assert not asked


def test_an_adopted_stewards_own_node_is_nobody_elses() -> None:
    """K3s had it before us, without our label."""
    wire = play(THREE_SERVERS)
    own = replace(wire._kube.nodes["a"], node=None)
    assert steward._is_anothers(node_of(wire, "a"), own, NodeId("e"))
    assert not steward._is_anothers(node_of(wire, "a"), own, NodeId("a"))


def test_a_grant_of_hours_ago_is_none() -> None:
    wire = play(THREE_SERVERS)
    slow_to_miss(wire)
    play("leave c stop\ngo 5s", wire)
    assert leaving_of(wire, "c").done
    play(
        "go 7200s\nrole d server\noff d\non d\nmeet a b c d\nready d\ndeliver\ngo 4s\n"
        "apply d done\ndeliver\ngo 4s\napply d done\ndeliver",
        wire,
    )
    c = wire.machines["c"]
    c.met -= {"a", "b", "d"}  # what they tell comes late, and b goes off meanwhile
    play("probed d\ndeliver\ngo 1s\noff b\ngo 1s", wire)
    c.met |= {"a", "d"}
    play("meet a c d\ndeliver\ngo 30s", wire)
    assert c.order is not None
    assert c.order.action is not Action.STEP_DOWN
