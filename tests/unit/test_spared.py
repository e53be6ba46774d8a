# SPDX-License-Identifier: Apache-2.0
"""No server stops by an order, or leaves, while etcd would lose its quorum or nobody can tell."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from k3sagentd.cli import operate
from k3sagentd.core.k3s import Action, Order, Outcome
from k3sagentd.errors import MachineError
from k3sagentd.k3s import spared, underway
from k3sagentd.k3s.kube import Kube
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import leave
from tests.unit.fake_api import FakeApi, failure
from tests.unit.machine import Daemon, Server
from tests.unit.rooted import AS_SERVER, JOIN_AGENT, SERVER, WAL, Machine

STEP_DOWN = replace(JOIN_AGENT, action=Action.STEP_DOWN)


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A server, n1, whose K3s runs."""
    made = Machine(tmp_path / "machine", monkeypatch)
    made.put(*AS_SERVER, WAL)
    made.ours(SERVER, **{"node-name": "n1"})
    return made


@pytest.fixture
def fake(m: Machine, tmp_path: Path) -> Iterator[FakeApi]:
    """The API of its K3s; the Node n1 is ready there."""
    made = FakeApi(tmp_path / "api")
    admin = Paths(tmp_path / "admin")
    made.give_certificates(admin.k3s_data / "server/tls")
    m.api = Kube(admin, made.url)
    made.add_node("n1", server=True)
    yield made
    made.close()


def is_refused(m: Machine, order: Order, why: str) -> None:
    """It fails for now, and K3s and its data are as they were."""
    before = m.files()
    result = m.apply(order)
    assert result.outcome is Outcome.FAILED, result
    assert why in str(result.reason)
    assert (m.files(), m.k3s.did) == (before, [])


def test_k3s_that_was_never_ready_is_not_missed(m: Machine, monkeypatch) -> None:
    monkeypatch.setattr(spared, "Kube", Kube)
    authority = m.paths.k3s_data / "server/tls/server-ca.crt"
    authority.unlink()
    spared.check(m.paths, running=True)
    authority.write_text("damaged")
    with pytest.raises(MachineError, match="not known whether the other servers are a quorum"):
        spared.check(m.paths, running=True)


@pytest.mark.parametrize("order", [STEP_DOWN, JOIN_AGENT], ids=lambda order: order.action)
def test_no_server_becomes_an_agent_while_it_is_needed(
    m: Machine, fake: FakeApi, order: Order
) -> None:
    for name in ("n2", "n3"):
        fake.add_node(name, server=True, ready=False)
    is_refused(m, order, "0 of the other servers are ready, 2 must be before this one stops")
    # The order is the daemon's word, and so is the name in it.
    is_refused(m, replace(order, node_name="n9"), "0 of the other servers are ready")
    for name in ("n2", "n3"):
        fake.add_node(name, server=True)
    assert m.apply(order).outcome is Outcome.DONE
    assert "stop" in m.k3s.did


def test_a_server_that_is_needed_by_the_time_it_is_to_stop_goes_on(
    m: Machine, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take minutes to install what it is to be; another server goes off meanwhile."""
    for name in ("n2", "n3"):
        fake.add_node(name, server=True)
    monkeypatch.setattr(m.k3s, "install", lambda _: fake.add_node("n2", server=True, ready=False))
    is_refused(m, JOIN_AGENT, "1 of the other servers are ready, 2 must be before this one stops")
    assert m.k3s.running(SERVER)


def test_who_is_no_member_any_more_is_not_needed(m: Machine, fake: FakeApi) -> None:
    del fake.nodes["n1"]
    fake.add_node("n2", server=True, ready=False)
    m.does(STEP_DOWN, "stop")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_api_that_is_busy_says_nothing_of_the_quorum(
    m: Machine, fake: FakeApi, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(fake, "answer", lambda *_: (status, failure("too many requests")))
    why = "it is not known whether the other servers are a quorum without this one: GET https://"
    for leader in (True, None):
        monkeypatch.setattr(spared, "_has_leader", lambda said=leader: said)
        is_refused(m, STEP_DOWN, why)
    # Where etcd has no leader and finds none, the others are no quorum even with this one.
    looks = iter([False] * 3 + [True] + [False] * 100)
    monkeypatch.setattr(spared, "_has_leader", lambda: next(looks))
    monkeypatch.setattr(spared, "LOOK_S", 0.01)
    is_refused(m, STEP_DOWN, why)
    monkeypatch.setattr(spared, "LEADERLESS_S", 0.05)
    m.does(STEP_DOWN, "stop")


def test_an_api_where_nobody_listens_takes_no_part(m: Machine, fake: FakeApi) -> None:
    fake.add_node("n2", server=True, ready=False)
    fake.close()
    m.does(STEP_DOWN, "stop")


def test_a_server_that_is_stopped_is_not_asked(m: Machine, fake: FakeApi) -> None:
    fake.add_node("n2", server=True, ready=False)
    m.k3s.role = None
    assert m.apply(STEP_DOWN).outcome is Outcome.DONE
    assert fake.requests == []


@pytest.mark.parametrize("order", [STEP_DOWN, JOIN_AGENT], ids=lambda order: order.action)
def test_who_becomes_a_member_while_it_is_stopped_is_one(
    m: Machine, fake: FakeApi, monkeypatch: pytest.MonkeyPatch, order: Order
) -> None:
    """K3s was about to join as a server. Of two members neither may be off."""
    (m.paths.k3s_data / WAL).rmdir()
    for name in AS_SERVER:
        (m.paths.k3s_data / name).unlink()
    fake.add_node("n2", server=True)

    def joins() -> None:
        m.put(*AS_SERVER, WAL)
        m.k3s.role = None

    with monkeypatch.context() as patch:
        patch.setattr(m.k3s, "halt", joins)
        said = m.said()
        result = m.apply(order)
    assert result.outcome is Outcome.FAILED
    assert "K3s has become a member of etcd here just now" in str(result.reason)
    assert not result.started, "that was of an agent"
    assert m.k3s.running(SERVER)
    assert (m.paths.k3s_data / WAL).exists()
    assert m.said() == said
    # From here on it is asked whether the cluster can do without it.
    assert "1 of the other servers are ready, 2 must be" in str(m.apply(order).reason)
    assert m.k3s.running(SERVER)
    del fake.nodes["n1"]
    assert m.apply(order).outcome is Outcome.DONE
    assert (m.paths.k3s_data / "server.before-agent/db/etcd/member/wal").exists()


SAYS = b"# TYPE etcd_server_has_leader gauge\netcd_server_has_leader %s\nother 1\n"


@pytest.mark.parametrize(
    ("said", "understood"), [(SAYS % b"0", False), (SAYS % b"1", True), (b"other 0\n", None)]
)
def test_what_etcd_says_of_its_leader(
    monkeypatch: pytest.MonkeyPatch, said: bytes, understood: bool | None
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as etcd:
        monkeypatch.setattr(spared, "METRICS", etcd.server_address)
        threading.Thread(target=etcd.serve_forever, args=(0.02,), daemon=True).start()
        assert spared._has_leader() is understood
        etcd.shutdown()
    assert spared._has_leader() is None


# --- leave ----------------------------------------------------------------------------------


def test_no_server_leaves_while_it_is_needed(server: Server, daemon: Daemon, api: FakeApi) -> None:
    """Whatever the server said that was asked: it may be late, or not K3s's word."""
    for name, ready in (("n1", True), ("n2", True), ("n3", False)):
        api.add_node(name, server=True, ready=ready)
    with pytest.raises(MachineError, match="1 of the other servers are ready, 2 must be"):
        operate.leave(server.paths, yes=True)
    assert [step for step, _ in daemon.asked] == ["drain", "stop"]
    assert not server.paths.underway.exists(), "orders are obeyed as before"
    # One that was granted and cut short: that was then.
    underway.save(server.paths, Progress(command="leave", step=leave.DRAINED))
    with pytest.raises(MachineError, match="1 of the other servers are ready, 2 must be"):
        operate.leave(server.paths, yes=True)
    assert server.said == []
    api.add_node("n3", server=True)
    assert operate.leave(server.paths, yes=True) == 0
