# SPDX-License-Identifier: Apache-2.0
"""A server that has another address than etcd knows: what its node says, and when it is silent."""

from dataclasses import replace
from pathlib import Path

import ifaddr
import pytest

from k3sagentd.config import load_config
from k3sagentd.core import machine, standing, status, view
from k3sagentd.core.events import AddressChanged, FactsRead, HelloReceived, K3sProbed, PeerLost
from k3sagentd.core.hello import own_hello
from k3sagentd.core.k3s import Datastore, Facts, K3sState
from k3sagentd.core.log import Nominate, Seal
from k3sagentd.core.state import Durable, Node, Site
from k3sagentd.core.words import NodeId, NodePhase, Role
from k3sagentd.discovery import addresses
from k3sagentd.k3s import facts, underway
from k3sagentd.k3s.underway import Progress
from tests.unit.machine import NEW, OLD, Server

A, B = NodeId("a" * 32), NodeId("b" * 32)
CA = "c" * 64
MEMBER = Facts(datastore=Datastore.ETCD, ca_hash=CA, fsync_ms=1.0, node_ip=OLD)
READY = K3sState(running=True, ready=True, ca_hash=CA, detail="ready")
LINE = (
    f"a person: etcd knows this server at {OLD}, its address is {NEW} now; give it back, or run "
    "k3sagentd repair-addresses here"
)


def node(found: Facts | None, address: str | None, *also: str, me: NodeId = A) -> Node:
    """A server of a sealed site, as its daemon starts."""
    site = Site(nodes=3, servers=3, role=Role.AUTO, election_key=b"k", hostname=me[0], instance="i")
    log = (Nominate(init=B, servers=(A, B)), Seal(ca_hash=CA, addresses=()))
    started = machine.new_node(site, Durable(node=me, nodes=3, log=log), 0.0)
    if found is not None:
        started, _ = machine.step(started, FactsRead(now_s=0.0, facts=found))
    return machine.step(started, AddressChanged(now_s=0.0, address=address, also=also))[0]


@pytest.mark.parametrize(
    ("found", "address", "also", "moved"),
    [
        (MEMBER, NEW, (), True),
        (MEMBER, NEW, ("192.168.1.7", "fd00::1"), True),
        (MEMBER, OLD, (), False),
        # Its K3s is at home: another interface has the default route, or is chosen since.
        (MEMBER, NEW, (OLD,), False),
        # Nothing is known: it waits for an address, or root has not looked.
        (MEMBER, None, (), False),
        (None, NEW, (), False),
        # K3s takes what it finds; or a command changes it just now.
        (replace(MEMBER, node_ip=None), NEW, (), False),
        (replace(MEMBER, datastore=Datastore.AGENT), NEW, (), False),
        (replace(MEMBER, datastore=Datastore.NONE), NEW, (), False),
    ],
)
def test_who_says_that_it_moved(
    found: Facts | None, address: str | None, also: tuple[str, ...], moved: bool
) -> None:
    here = node(found, address, *also)
    assert own_hello(here).moved is moved
    assert (status.waiting_for(here, 0.0) == LINE) is moved
    assert (standing.moved(here) is not None) is moved


def test_whoever_is_ready_is_a_member_whatever_its_address() -> None:
    here = node(MEMBER, NEW)
    ready, _ = machine.step(here, K3sProbed(now_s=1.0, state=READY))
    assert ready.phase is NodePhase.READY
    assert not own_hello(ready).moved


def test_a_change_of_any_address_is_told() -> None:
    here = node(MEMBER, NEW)
    assert here.announced is not None
    assert here.announced.moved
    back = AddressChanged(now_s=1.0, address=NEW, also=(OLD,))
    again, effects = machine.step(here, back)
    assert [each.hello.moved for each in effects if hasattr(each, "hello")] == [False]
    assert again.announced is not None
    assert again.announced.revision == here.announced.revision + 1


def test_others_have_it_in_their_status() -> None:
    here, there = node(MEMBER, OLD), node(MEMBER, NEW, me=B)
    here, _ = machine.step(here, HelloReceived(now_s=1.0, hello=own_hello(there)))

    def row(now_s: float) -> dict:
        rows = view.as_json(here, now_s)["nodes"]
        return next(each for each in rows if each["id"] == B)

    assert (row(1.0)["moved"], row(1.0)["member"], row(1.0)["age_s"]) == (True, True, 0)
    here, _ = machine.step(here, PeerLost(now_s=1.01, peer=B))
    assert row(1.02)["age_s"] > 0, "who is not heard never counts as heard"


def test_a_command_that_has_not_ended_is_named() -> None:
    half = replace(MEMBER, node_ip=None, unfinished="repair-addresses")
    said = "k3sagentd repair-addresses has not ended here; where it runs no more, run it again"
    here = node(half, NEW)
    assert status.waiting_for(here, 0.0) == f"a person: {said}"
    ready, _ = machine.step(here, K3sProbed(now_s=1.0, state=READY))
    assert status.waiting_for(ready, 1.0) is None
    assert said in status.notes(ready, 1.0)


# --- what root says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "known"),
    [
        (None, NEW),
        # The drop-in has the new address, etcd the old one: K3s has not run with it.
        (Progress(command="repair-addresses", step="write", was=OLD), OLD),
        (Progress(command="repair-addresses", step="write", was=OLD, sure=False), None),
        (Progress(command="leave", step="drained"), None),
    ],
)
def test_what_etcd_knows_is_what_the_command_says(
    tmp_path: Path, begun: Progress | None, known: str | None
) -> None:
    server = Server(tmp_path)
    server.tell(node_ip=NEW)
    if begun is not None:
        underway.save(server.paths, begun)
    found = facts.collect(server.paths, load_config(server.paths), 1.0)
    assert (found.node_ip, found.unfinished) == (known, begun.command if begun else None)


def test_of_a_command_that_cannot_be_read_nothing_is_sure(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.paths.underway.parent.mkdir(parents=True, exist_ok=True)
    server.paths.underway.write_text("{")
    found = facts.collect(server.paths, load_config(server.paths), 1.0)
    assert (found.node_ip, found.unfinished) == (None, "command")


def test_all_addresses_count_that_others_may_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapter(name: str, *ips: object) -> ifaddr.Adapter:
        return ifaddr.Adapter(name, name, [ifaddr.IP(ip, 24, name) for ip in ips], 1)

    there = [
        adapter("lo", "127.0.0.1", ("::1", 0, 0)),
        adapter("eth0", OLD, ("fe80::1", 0, 2), ("fd00::1", 0, 0)),
        adapter("wlan0", "169.254.7.7", "192.168.1.7"),
    ]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: there)
    assert addresses.present() == [OLD, "192.168.1.7", "fd00::1"]
