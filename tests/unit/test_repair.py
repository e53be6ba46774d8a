# SPDX-License-Identifier: Apache-2.0
"""A server whose address changed, step by step, on a root directory."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ifaddr
import pytest
import yaml

from k3sagentd.cli import operate
from k3sagentd.config import load_config
from k3sagentd.errors import ConfigError, MachineError, TimedOutError, UnavailableError
from k3sagentd.k3s import facts, install, underway
from k3sagentd.k3s.kube import Kube
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import repair
from tests.unit.fake_api import FakeApi
from tests.unit.machine import AT, ME, NEW, OLD, Daemon, Server, row, status


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path / "root")
    monkeypatch.setattr(install, "PATH", f"{made.paths.root}/bin:{install.PATH}")
    return made


@pytest.fixture
def daemon(server: Server) -> Iterator[Daemon]:
    with Daemon(server) as made:
        yield made


@pytest.fixture
def api(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The only server that answers, whatever its address."""
    made = FakeApi(tmp_path / "api")
    made.give_certificates(server.paths.k3s_data / "server/tls")
    asked: list[str] = []
    made.urls = asked

    def client(paths: Paths, url: str = "local") -> Kube:
        asked.append(url)
        return Kube(paths, made.url)

    monkeypatch.setattr(repair, "Kube", client)
    monkeypatch.setattr(repair, "API_POLL_S", 0.01)
    yield made
    made.close()


def planned(server: Server, view: dict) -> Progress:
    found = repair.plan(server.paths, load_config(server.paths), AT, view)
    assert found is not None
    return found.progress


def carry_out(server: Server, progress: Progress) -> list[str]:
    steps: list[str] = []
    repair.carry_out(server.paths, load_config(server.paths), progress, steps.append)
    assert not server.paths.underway.exists()
    return steps


def told(server: Server) -> dict:
    return yaml.safe_load(server.paths.dropin.read_text())


READY2 = row(2, phase="ready")


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
        repair.carry_out(server.paths, load_config(server.paths), progress, lambda _: None)
    assert "n1" in api.nodes
    assert underway.load(server.paths) == replace(progress, step=repair.STOP)


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


def test_a_server_makes_its_copy_the_cluster_where_none_answers(
    server: Server, api: FakeApi
) -> None:
    for name in ("n1", "n2", "n3"):
        api.add_node(name, server=True)
    api.add_node("agent")
    flag = server.paths.k3s_data / "server/db/reset-flag"
    flag.touch()  # of an attempt that was cut off
    progress = planned(server, status(row(2), row(3, age_s=99)))
    assert progress.server is None
    carry_out(server, progress)
    assert set(api.nodes) == {"n1", "agent"}
    assert set(api.urls) == {"local"}
    assert server.said == [
        "disable --now k3s.service",
        "reset-failed k3s.service",
        "k3s server --cluster-reset",
        "daemon-reload",
        "enable k3s.service",
        "start --no-block k3s.service",
    ]
    assert told(server)["node-ip"] == NEW
    assert not {"server", "cluster-init"} & told(server).keys()
    assert (server.paths.k3s_data / "server/db/etcd/name").exists()


@pytest.mark.parametrize(
    ("others", "servers", "roster", "may"),
    [
        ([row(2), row(3)], 3, None, True),
        ([row(2), row(3, age_s=9)], 3, None, True),
        ([row(2, age_s=9), row(3, age_s=9)], 3, None, False),
        ([row(2)], 3, None, True),
        ([], 3, None, False),
        ([], 1, None, True),
        ([], 3, ["a" * 32], True),
        ([row(2, role="agent"), row(3, role="agent")], 3, None, False),
        ([row(2), row(3, age_s=9)], 5, None, False),
        ([row(2), row(3), row(4, age_s=9)], 5, None, True),
        ([row(2), row(3, age_s=9)], 3, [f"{n}" * 32 for n in range(2, 6)], False),
        ([row(2), row(3)], 3, ["a" * 32, *(f"{n}" * 32 for n in range(2, 6))], True),
        ([row(2, age_s=9), row(3)], 3, ["a" * 32, "2" * 32], True),
    ],
)
def test_who_must_be_heard_before_a_copy_becomes_the_cluster(
    server: Server, others: list[dict], servers: int, roster: list[str] | None, may: bool
) -> None:
    view = status(*others, servers=servers, roster=roster)
    if may:
        assert planned(server, view).server is None
    else:
        with pytest.raises(UnavailableError, match=r"may be a quorum .* Not heard: ") as caught:
            planned(server, view)
        for each in others:
            assert (each["name"] in str(caught.value)) is (
                each["role"] == "server" and each["age_s"] > 0
            )


def test_a_site_that_is_not_sealed_has_nothing_to_repair(server: Server) -> None:
    view = status(READY2)
    view["site"]["phase"] = "conflict"
    with pytest.raises(UnavailableError, match="the site is conflict"):
        planned(server, view)
    with pytest.raises(MachineError, match="no address"):
        repair.plan(server.paths, load_config(server.paths), None, status(READY2))


def test_who_began_alone_joins_a_server_that_came_meanwhile(server: Server, api: FakeApi) -> None:
    api.add_node("n2", server=True)
    begun = planned(server, status(row(2)))
    for step in ("", repair.STOP, repair.WRITE):
        underway.save(server.paths, replace(begun, step=step))
        again = planned(server, status(READY2))
        assert (again.server, again.step) == ("https://127.0.0.2:6443", "")
    for step in (repair.RESET, repair.START):
        underway.save(server.paths, replace(begun, step=step))
        assert planned(server, status(READY2)) == replace(begun, step=step)


def test_who_began_with_a_server_does_not_go_on_alone(server: Server, api: FakeApi) -> None:
    api.add_node("n2", server=True)
    underway.save(server.paths, planned(server, status(READY2)))
    with pytest.raises(UnavailableError, match=r"127.0.0.2:6443, which this repair began with"):
        planned(server, status(row(2)))


def test_a_late_look_spares_who_joined_meanwhile(
    server: Server, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "STALE_S", 0.0)
    api.add_node("n1", server=True)
    api.add_node("n2", server=True)
    api.add_node("n3", server=True, ready=False)
    begun = replace(planned(server, status(row(2), row(3))), step=repair.START)
    assert carry_out(server, begun) == [repair.FORGET]
    assert set(api.nodes) == {"n1", "n2"}


def test_a_k3s_that_does_not_come_is_waited_for_in_bounds(
    server: Server, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "API_TIMEOUT_S", 0.1)
    progress = planned(server, status(row(2)))
    api.close()
    with pytest.raises(TimedOutError, match="run it again"):
        carry_out(server, progress)
    left = underway.load(server.paths)
    assert left is not None
    assert left.step == repair.START


def test_the_old_address_is_named(server: Server) -> None:
    found = repair.plan(server.paths, load_config(server.paths), AT, status(row(2)))
    assert found is not None
    assert f"was {OLD} and is {NEW} now" in found.question
    assert "what only others\nhad committed is lost" in found.question
