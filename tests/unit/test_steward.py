# SPDX-License-Identifier: Apache-2.0
"""What a ready server answers, where a scenario cannot say when what arrives."""

from dataclasses import replace

from k3sagentd.core import machine, roster
from k3sagentd.core.cluster import KubeNode
from k3sagentd.core.effects import Send
from k3sagentd.core.events import MessageReceived
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.messages import NotYet, RegistrationRequest
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
