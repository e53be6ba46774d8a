# SPDX-License-Identifier: Apache-2.0
"""How scenes of a site's life begin, and how they are played: as the daemon tells it to the core,
a probe finds K3s ready, and nobody has looked at the disk again since K3s began."""

from k3sagentd.core import status
from k3sagentd.core.events import K3sProbed
from k3sagentd.core.k3s import Datastore, Facts, K3sState, ServerOrAgent
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


def adopted(names: str, site: str) -> Wire:
    """``names`` have a cluster of before. All but a and b are off while it is adopted, so that the
    roster is a, b and n, which took the place of m."""
    wire = Wire()
    wire.obey(f"site {site} nodes=3 servers=3")
    for name in names:
        wire.machines[name].facts = Facts(
            fsync_ms=1.0, datastore=Datastore.ETCD, ca_hash=CA, node_name=name
        )
    return play(
        "on a b m\nmeet a b m\ndeliver\ngo 10s\napply a done\nready a\ndeliver\napply b done\n"
        "ready b\napply m done\ngo 4s\napply m done\nready m\ndeliver\ngo 10s\noff m\non n\n"
        "meet a b n\ngo 700s\napply n done\ngo 4s\napply n done\nready n\ngo 30s",
        wire,
    )


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
