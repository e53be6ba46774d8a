# SPDX-License-Identifier: Apache-2.0
"""A server whose address changed joins the others again, step by step, on a root directory."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import ifaddr
import pytest

from k3sagentd.cli import operate
from k3sagentd.config import load_config
from k3sagentd.errors import ConfigError, MachineError, UnavailableError
from k3sagentd.k3s import facts, underway
from k3sagentd.upkeep import repair
from tests.unit.fake_api import FakeApi
from tests.unit.machine import AT, ME, NEW, OLD, Daemon, Server, row, status
from tests.unit.repairing import ALL_MOVED, READY2, carry_out, planned, told


def test_the_command_asks_the_daemon_and_tells_it(
    server: Server,
    daemon: Daemon,
    api: FakeApi,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(operate, "attachment", lambda *_: AT)
    api.add_node("n1", server=True)
    daemon.errors["reread"] = "the daemon cannot read the facts"
    with pytest.raises(UnavailableError, match="cannot read the facts"):
        operate.repair_addresses(server.paths, yes=True)
    assert "k3s server --cluster-reset" not in server.said, "the others would not know"
    daemon.errors.clear()
    daemon.rereads = 0
    assert operate.repair_addresses(server.paths, yes=True) == 0
    assert "this server is the cluster now" in capsys.readouterr().out
    assert daemon.rereads == 2
    assert operate.repair_addresses(server.paths, yes=True) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert daemon.rereads == 3


def test_an_address_that_did_not_change_needs_nothing(server: Server) -> None:
    server.tell(node_ip=NEW)
    config = load_config(server.paths)
    assert repair.plan(server.paths, config, AT, status(READY2)) is None
    (server.paths.k3s_data / "server/db/etcd/member/wal").rmdir()
    server.tell()
    assert repair.plan(server.paths, config, AT, status(READY2)) is None, "no server"


def test_etcd_does_not_move_to_the_virtual_address(
    server: Server,
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server.paths.config.open("a") as file:
        file.write("interface: eth0\nvirtual-ip: 10.0.0.100/24\n")
    daemon.view["site"]["phase"] = "conflict"  # who has something to repair is refused
    ips = [ifaddr.IP(ip, 24, "eth0") for ip in ("10.0.0.100", OLD)]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [ifaddr.Adapter("eth0", "eth0", ips, 2)])
    assert operate.repair_addresses(server.paths, yes=True) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert told(server)["node-ip"] == OLD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.paths.dropin.unlink(), "is not k3sagentd's"),
        (lambda s: s.paths.dropin.write_text("node-ip: 10.0.0.1\nnode-name: n1\n"), "by hand"),
        (
            lambda s: s.paths.config.write_text("nodes: 3\nk3s: {node-ip: 10.0.0.1}\n"),
            "config.yaml: node-ip is set there",
        ),
        (
            lambda s: (s.paths.dropin.parent / "90-mine.yaml").write_text("node-ip: 10.0.0.1\n"),
            "90-mine.yaml: node-ip is set there",
        ),
    ],
)
def test_what_was_set_up_by_hand_is_mended_by_hand(
    server: Server, change: Callable[[Server], object], said: str
) -> None:
    change(server)
    with pytest.raises(ConfigError, match=said) as caught:
        repair.plan(server.paths, load_config(server.paths), AT, status(READY2))
    assert caught.value.exit_code == 78


def test_a_server_joins_again_while_the_others_go_on(server: Server, api: FakeApi) -> None:
    for name in ("n2", "n3"):
        api.add_node(name, server=True)
    uid = api.add_node("n1", server=True, ready=False)
    progress = planned(server, status(READY2, row(3, phase="ready")))
    assert (progress.server, progress.uid) == ("https://127.0.0.2:6443", uid)
    carry_out(server, progress)
    assert set(api.urls) == {"https://127.0.0.2:6443"}
    assert set(api.nodes) == {"n2", "n3"}
    assert server.said == [
        "disable --now k3s.service",
        "reset-failed k3s.service",
        "daemon-reload",
        "enable k3s.service",
        "start --no-block k3s.service",
    ]
    assert told(server) == {
        "node-ip": NEW,
        "node-name": "n1",
        "tls-san": [NEW, "k3s.example"],
        "flannel-iface": "eth0",
        "token-file": str(server.paths.k3s_token),
        "server": "https://127.0.0.2:6443",
    }
    ca = facts.collect(server.paths, load_config(server.paths)).ca_hash
    secure = f"K10{ca}::server:{server.paths.token.read_text()}\n"
    assert server.paths.k3s_token.read_text() == secure
    db = server.paths.k3s_data / "server/db"
    assert (db / "etcd.before-repair/name").exists()
    assert not (db / "etcd/name").exists()


@pytest.mark.parametrize("there", [{"n2": True, "n3": False}, {"n2": False}, {}])
def test_a_server_that_others_need_stays(
    server: Server, api: FakeApi, there: dict[str, bool]
) -> None:
    api.add_node("n1", server=True, ready=False)
    for name, ready in there.items():
        api.add_node(name, server=True, ready=ready)
    with pytest.raises(UnavailableError, match="would cost the quorum"):
        repair.plan(server.paths, load_config(server.paths), AT, status(READY2))
    assert "n1" in api.nodes
    assert server.said == []


@pytest.mark.parametrize("labels", [{}, {"k3sagentd_node_id": "b" * 32}])
def test_a_node_that_others_have_taken_stays(
    server: Server, api: FakeApi, labels: dict[str, str]
) -> None:
    for name in ("n1", "n2"):
        api.add_node(name, server=True)
    progress = planned(server, status(READY2))
    api.add_node("n1", server=True, **labels)
    with pytest.raises(MachineError, match="another machine has taken its name"):
        carry_out(server, progress)
    assert "n1" in api.nodes
    assert underway.load(server.paths) == replace(progress, step=repair.STOP, sure=False)


def test_a_node_that_k3s_made_anew_for_this_machine_is_its_own(
    server: Server, api: FakeApi
) -> None:
    for name in ("n1", "n2"):
        api.add_node(name, server=True)
    progress = planned(server, status(READY2))
    underway.save(server.paths, progress)
    api.add_node("n1", server=True, k3sagentd_node_id=ME)
    carry_out(server, planned(server, status(READY2)))
    assert set(api.nodes) == {"n2"}


def test_the_first_server_that_answers_is_asked(server: Server, api: FakeApi) -> None:
    api.add_node("n2", server=True)
    fail = iter([OSError("no route"), None])

    def once(method: str, path: str) -> None:
        if error := next(fail, None):
            raise error

    api.before = once
    with contextlib.redirect_stderr(None):
        progress = planned(server, status(READY2, row(3, phase="ready")))
    assert progress.server == "https://127.0.0.3:6443"


def test_a_site_that_is_not_sealed_has_nothing_to_repair(server: Server) -> None:
    view = status(READY2)
    view["site"]["phase"] = "conflict"
    with pytest.raises(UnavailableError, match="the site is conflict"):
        planned(server, view)
    with pytest.raises(MachineError, match="no address"):
        repair.plan(server.paths, load_config(server.paths), None, status(READY2))


def test_who_began_with_a_server_does_not_go_on_alone(server: Server, api: FakeApi) -> None:
    api.add_node("n2", server=True)
    underway.save(server.paths, planned(server, status(READY2)))
    with pytest.raises(UnavailableError, match=r"127.0.0.2:6443, which this repair began with"):
        planned(server, ALL_MOVED)
