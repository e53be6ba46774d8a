# SPDX-License-Identifier: Apache-2.0
"""What a ready server answers, where a scenario cannot say when what arrives."""

from dataclasses import replace

import pytest

from k3sagentd.core import machine, roster
from k3sagentd.core.cluster import KubeNode
from k3sagentd.core.effects import Send, WriteErrand
from k3sagentd.core.events import MessageReceived
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.messages import Message, NotYet, RegistrationRequest
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.kube import RELEASE
from tests.sim.scenario import Wire

A_SERVER_IS_DEAD = """\
site a b c e nodes=3
on a b c
meet a b c
deliver
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
deliver
off c
go 310s
on e
meet a e"""


def test_who_asks_before_its_hello_says_so_may_still_become_a_server() -> None:
    wire = Wire()
    for command in A_SERVER_IS_DEAD.splitlines():
        wire.obey(command)
    node, fresh = wire.machines["a"].node, NodeId("e")
    assert node is not None
    peer = node.peers[fresh]
    hello = replace(peer.hello, phase=NodePhase.DISCOVERING, k3s_role=None)
    node = node.but(peers={**node.peers, fresh: replace(peer, hello=hello)})
    request = RegistrationRequest(role=ServerOrAgent.AGENT, node_name="e")
    event = MessageReceived(now_s=wire.now_s, sender=fresh, message=request)
    _, effects = machine.step(node, event)
    (answer,) = [each.message for each in effects if isinstance(each, Send)]
    assert answer == NotYet(reason="this machine to be listed as a server", soon=True)


def test_who_joins_installs_the_release_of_the_servers() -> None:
    wire = Wire()
    for command in A_SERVER_IS_DEAD.splitlines()[:-4]:
        wire.obey(command)
    for command in ("on e", "meet a b e", "deliver", "go 4s"):
        wire.obey(command)
    node = wire.machines["e"].node
    assert node is not None
    assert node.drive.order is not None
    assert node.drive.order.k3s_version == RELEASE


def test_k3s_word_that_a_silent_machine_is_alive_is_good_for_replace_after() -> None:
    """The default of half an hour: five minutes. A site in a hurry: no longer than it set."""
    wire = Wire()
    for command in A_SERVER_IS_DEAD.splitlines()[:-4]:
        wire.obey(command)
    node = wire.machines["a"].node
    assert node is not None
    assert node.steward.view is not None
    kube = KubeNode(name="c", uid="3", node=NodeId("c"), hardware=None, server=True, ready=True)
    view = replace(node.steward.view, nodes=(kube,))
    peers = {each: replace(peer, up=False, lost_s=0.0) for each, peer in node.peers.items()}
    for replace_after_s, good_s in ((1800.0, 300.0), (10.0, 10.0)):
        site = replace(node.site, replace_after_s=replace_after_s)
        steward = replace(node.steward, view=view, viewed_s=replace_after_s)
        waiting = node.but(site=site, peers=peers, steward=steward)
        until_s = replace_after_s + good_s
        assert not roster.must_look(waiting, until_s - 0.1)
        assert roster.is_heard_by_k3s(waiting, NodeId("c"), until_s - 0.1)
        assert not roster.is_gone(waiting, NodeId("c"), until_s - 0.1)
        assert roster.must_look(waiting, until_s)


ALL_ARE_UP = [*A_SERVER_IS_DEAD.splitlines()[:-4], "go 310s", "on e", "meet a e"]
KUBE = KubeNode(name="n1", uid="1", node=None, hardware=None, server=True, ready=False)


def what_becomes_of(kube: KubeNode, namesakes: tuple[str, ...]) -> tuple[Message, str | None]:
    """What a answers to e, which joins as n1, and the Node that it has root remove then."""
    wire = Wire()
    for command in ALL_ARE_UP:
        wire.obey(command)
    node = wire.machines["a"].node
    assert node is not None
    assert node.steward.view is not None
    peers = {
        each: replace(peer, hello=replace(peer.hello, node_name="n1"))
        if each in (*namesakes, "e")
        else peer
        for each, peer in node.peers.items()
    }
    view = replace(node.steward.view, nodes=(kube,), holder=node.id)
    steward = replace(node.steward, view=view, viewed_s=wire.now_s, errand=None)
    node = node.but(peers=peers, steward=steward)
    if "a" in namesakes:
        node = node.but(durable=replace(node.durable, node_name="n1"))
    request = RegistrationRequest(role=ServerOrAgent.AGENT, node_name="n1")
    event = MessageReceived(now_s=wire.now_s, sender=NodeId("e"), message=request)
    _, effects = machine.step(node, event)
    (answer,) = [each.message for each in effects if isinstance(each, Send)]
    removed = [each.errand.remove for each in effects if isinstance(each, WriteErrand)]
    return answer, removed[0] if removed else None


@pytest.mark.parametrize("owner", ["a", "b"])
@pytest.mark.parametrize("label", [None, "another life of it"])
def test_the_node_of_a_machine_that_is_up_is_not_in_the_way(owner: str, label: str | None) -> None:
    """Adopted, or older than its identity: the Node does not say whose it is, but its name does."""
    kube = replace(KUBE, node=label and NodeId(label))
    answer, removed = what_becomes_of(kube, (owner,))
    address = {"a": "10.0.0.1", "b": "10.0.0.2"}[owner]
    assert answer == NotYet(
        reason=f"another name: n1 is the machine at {address}; change the hostname of the one "
        "that joins, and k3sagentd reset there"
    )
    assert removed is None


def test_our_own_node_is_not_in_the_way() -> None:
    answer, removed = what_becomes_of(replace(KUBE, node=NodeId("a")), ())
    assert isinstance(answer, NotYet)
    assert answer.reason.startswith("another name: n1 is the machine at 10.0.0.1;")
    assert removed is None


@pytest.mark.parametrize(
    ("kube", "namesakes"),
    [
        (KUBE, ()),
        (replace(KUBE, node=NodeId("e")), ("b",)),
        (replace(KUBE, node=NodeId("f"), hardware="hardware of e"), ("b",)),
    ],
    ids=["nobody's", "the joiner's own", "of the joiner's hardware"],
)
def test_a_node_that_nobody_up_has_a_right_to_is_removed(
    kube: KubeNode, namesakes: tuple[str, ...]
) -> None:
    answer, removed = what_becomes_of(kube, namesakes)
    assert answer == NotYet(
        reason="the Node n1 of an earlier installation to be removed", soon=True
    )
    assert removed == "n1"
