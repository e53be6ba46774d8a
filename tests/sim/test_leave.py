# SPDX-License-Identifier: Apache-2.0
"""Who asks to leave is told what is so at that moment, not what K3s or the log still says."""

from k3sagentd.core.cluster import KubeNode
from k3sagentd.core.k3s import Action
from k3sagentd.core.state import Leaving
from tests.sim.scenario import Wire
from tests.sim.test_life import THREE_SERVERS, node_of, play

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
