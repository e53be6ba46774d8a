# SPDX-License-Identifier: Apache-2.0
"""How scenes of a site's life begin, and how they are played: as the daemon tells it to the core,
a probe finds K3s ready, and nobody has looked at the disk again since K3s began."""

from k3sagentd.core import status
from k3sagentd.core.events import K3sProbed
from k3sagentd.core.k3s import K3sState, ServerOrAgent
from k3sagentd.core.state import Node
from tests.sim.scenario import Wire

CA = "a0" * 32
THREE_SERVERS = """\
site a b c d e nodes=4
on a b c d
meet a b c d
deliver
apply a done
probed a
deliver
apply b done
apply c done
deliver
go 4s
apply b done
probed b
deliver
go 4s
apply c done
probed c
apply d done
probed d
deliver
go 60s"""


def play(commands: str, wire: Wire | None = None) -> Wire:
    """Obey ``commands``; ``probed`` is what a probe alone says of a K3s that is ready."""
    wire = wire or Wire()
    for command in commands.splitlines():
        if command.startswith("probed "):
            probed(wire, command.split()[1])
        else:
            wire.obey(command)
    return wire


def probed(wire: Wire, name: str) -> None:
    m = wire.machines[name]
    assert m.node is not None
    m.ready = True
    order = m.node.drive.order
    assert order is not None
    server = order.role is ServerOrAgent.SERVER
    wire._kube.register(m.id, m.site.hardware, server=server)
    ca_hash = (m.node.seal.ca_hash if m.node.seal else CA) if server else None
    feed(wire, name, K3sState(running=True, ready=True, ca_hash=ca_hash, detail="ready"))


def feed(wire: Wire, name: str, state: K3sState) -> None:
    m = wire.machines[name]
    m.ready = state.ready
    wire._feed(m, K3sProbed(now_s=wire.now_s, state=state))


def node_of(wire: Wire, name: str) -> Node:
    node = wire.machines[name].node
    assert node is not None
    return node


def said(wire: Wire, name: str) -> str:
    return str(status.waiting_for(node_of(wire, name), wire.now_s))
