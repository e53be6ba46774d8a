# SPDX-License-Identifier: Apache-2.0
"""The cluster's mDNS name: which addresses, and one change on the wire after the other."""

import asyncio
from dataclasses import replace

import pytest

from k3sagentd import keys
from k3sagentd.core import drive, machine, registration, status, view
from k3sagentd.core.events import Tick
from k3sagentd.core.hello import live_servers, name_answer, own_hello
from k3sagentd.core.k3s import (
    Action,
    Datastore,
    Facts,
    K3sState,
    Outcome,
    Result,
    ServerOrAgent,
)
from k3sagentd.core.log import Nominate, Seal
from k3sagentd.core.state import Drive, Durable, Node, Peer, Site
from k3sagentd.core.words import NodeId, NodePhase, Role
from k3sagentd.discovery.api_name import ApiName, packed

A, B, C, D = (NodeId(letter * 32) for letter in "abcd")
FIXED = ("k3s.lan", "10.0.0.100")
SEAL = Seal(ca_hash="c" * 64, addresses=("https://10.0.0.1:6443",))
READY = K3sState(running=True, ready=True, ca_hash="c" * 64, detail="ready")


def node(me: NodeId, address: str, *, ready: bool = True, fixed: tuple[str, ...] = ()) -> Node:
    """A node of a sealed site whose servers are A, B and C."""
    site = Site(nodes=3, servers=3, role=Role.AUTO, election_key=b"k", hostname=me[0],
                instance="i", fixed_addresses=fixed)  # fmt: skip
    log = (Nominate(init=A, servers=(A, B, C)), SEAL)
    found = machine.new_node(site, Durable(node=me, nodes=3, log=log), 0.0)
    return found.but(address=address, k3s=READY if ready else K3sState())


def hearing(me: Node, *others: Node, up: bool = True) -> Node:
    peers = {each.id: Peer(hello=own_hello(each), up=up, heard_s=0.0) for each in others}
    return me.but(peers=peers)


ONE, TWO, THREE = node(A, "10.0.0.9"), node(B, "10.0.0.2"), node(C, "10.0.0.3")
AGENT = node(D, "10.0.0.4")


def test_every_ready_server_answers_alike() -> None:
    expected = ("10.0.0.2", "10.0.0.3", "10.0.0.9")
    assert name_answer(hearing(ONE, TWO, THREE, AGENT)) == expected
    assert name_answer(hearing(TWO, AGENT, ONE, THREE)) == expected


def test_who_is_no_ready_server_does_not_answer_but_knows_them() -> None:
    starting = hearing(node(A, "10.0.0.9", ready=False), TWO)
    agent = hearing(AGENT, TWO)
    for each in (starting, agent):
        assert name_answer(each) == ()
        assert live_servers(each) == ("10.0.0.2",)


def test_who_is_not_heard_or_not_ready_is_not_in_the_answer() -> None:
    assert name_answer(hearing(ONE, TWO, up=False)) == ("10.0.0.9",)
    assert name_answer(hearing(ONE, node(B, "10.0.0.2", ready=False))) == ("10.0.0.9",)


def test_the_fixed_addresses_go_first_and_the_servers_stay_as_fallback() -> None:
    me = hearing(node(A, "10.0.0.9", fixed=FIXED), TWO, AGENT)
    fixed = ("https://k3s.lan:6443", "https://10.0.0.100:6443")
    found = registration.registration(me, D, ServerOrAgent.AGENT)
    assert found is not None
    assert found.servers[:2] == fixed
    assert set(found.servers[2:]) == {"https://10.0.0.2:6443", "https://10.0.0.9:6443"}
    assert view.as_json(me, 0.0)["site"]["registration"] == [
        *fixed, "https://10.0.0.2:6443", "https://10.0.0.9:6443"
    ]  # fmt: skip


def test_an_order_to_join_has_them_first_too_whoever_is_heard() -> None:
    me = hearing(node(D, "10.0.0.4", ready=False, fixed=FIXED), TWO)
    order = drive._order(me, Action.JOIN)
    assert order.servers == (
        "https://k3s.lan:6443", "https://10.0.0.100:6443", "https://10.0.0.2:6443"
    )  # fmt: skip


def test_what_is_left_of_an_order_is_tried_again_while_k3s_is_ready() -> None:
    me = node(D, "10.0.0.4").but(phase=NodePhase.READY, facts=Facts(datastore=Datastore.AGENT))
    order = drive._order(me, Action.JOIN)
    result = Result(order=order, outcome=Outcome.FAILED, step="x", reason="no keepalived")
    failed = me.but(
        drive=Drive(order=order, outcome=Outcome.FAILED, result=result, retry_at_s=10.0)
    )
    assert status.notes(failed, 0.0)[0] == "join failed at «x»: no keepalived"
    early, _ = machine.step(failed, Tick(now_s=9.0))
    assert early.drive.order == order
    late, _ = machine.step(failed, Tick(now_s=10.0))
    assert late.drive.order == replace(order, attempt=1)


def test_the_name_follows_from_the_token() -> None:
    site = keys.derive(b"a token")
    assert keys.mdns_name(site.site_id) == f"k3s-{site.site_id[:6]}.local"
    assert keys.mdns_name("0123456789abcdef") == "k3s-012345.local"


def test_what_is_no_address_is_left_out() -> None:
    assert packed(("10.0.0.1", "x", "fd00::1")) == [b"\x0a\0\0\1", b"\xfd" + b"\0" * 14 + b"\1"]


class Wire:
    """Notes what is announced, as AsyncZeroconf would; each announcement takes its time."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.zeroconf = self.registry = self

    def _note(self, what: str, info) -> asyncio.Task[None]:
        assert info.server == "k3s-012345.local."
        self.done.append((what, len(info.addresses)))
        return asyncio.ensure_future(asyncio.sleep(0.01))

    async def async_register_service(self, info, cooperating_responders: bool = False):
        assert cooperating_responders
        return self._note("register", info)

    async def async_update_service(self, info):
        return self._note("update", info)

    async def async_unregister_service(self, info):
        return self._note("unregister", info)

    def async_remove(self, info) -> None:
        self.done.append(("remove", len(info.addresses)))


def changes(*told: tuple[str, ...], detach: bool = False) -> list[tuple[str, int]]:
    """What is on the wire after each of ``told`` was shown in its turn."""

    async def run() -> list[tuple[str, int]]:
        wire, name = Wire(), ApiName("k3s-012345.local")
        name.show(told[0])
        name.attach(wire)  # type: ignore[arg-type]
        for each in told:
            name.show(each)
            await asyncio.sleep(0.05)
        if detach:
            await name.detach()
        return wire.done

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([("10.0.0.1",)], [("register", 1)]),
        ([()], []),
        ([("10.0.0.1",), ("10.0.0.1", "10.0.0.2")], [("register", 1), ("update", 2)]),
        # Alone, it says goodbye; else that would take the name from the others too.
        ([("10.0.0.1",), ()], [("register", 1), ("unregister", 1)]),
        ([("10.0.0.1", "10.0.0.2"), ()], [("register", 2), ("remove", 2)]),
    ],
)
def test_changes_are_announced(told: list[tuple[str, ...]], expected: list) -> None:
    assert changes(*told) == expected


def test_a_daemon_that_ends_says_no_goodbye_for_the_name() -> None:
    assert changes(("10.0.0.1",), detach=True) == [("register", 1), ("remove", 1)]


def test_changes_while_one_is_announced_end_with_the_last() -> None:
    async def run() -> list[tuple[str, int]]:
        wire, name = Wire(), ApiName("k3s-012345.local")
        name.attach(wire)  # type: ignore[arg-type]
        for count in (1, 2, 3):
            name.show(tuple(f"10.0.0.{each}" for each in range(count)))
            await asyncio.sleep(0.002)
        async with asyncio.timeout(10):
            while wire.done[-1:] != [("update", 3)]:
                await asyncio.sleep(0.002)
        return wire.done

    done = asyncio.run(run())
    assert done[0] == ("register", 1)
    assert done.count(("update", 3)) == 1
