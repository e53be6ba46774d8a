# SPDX-License-Identifier: Apache-2.0
"""What a ready server answers, where a scenario cannot say when what arrives."""

from dataclasses import replace

from k3sagentd.core import machine
from k3sagentd.core.effects import Send
from k3sagentd.core.events import MessageReceived
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.messages import NotYet, RegistrationRequest
from k3sagentd.core.words import NodeId, NodePhase
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
