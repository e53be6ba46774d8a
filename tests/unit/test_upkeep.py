# SPDX-License-Identifier: Apache-2.0
"""Leave, reset and repair, step by step, on a root directory."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from k3sagentd.cli import ask, main, operate
from k3sagentd.config import load_config
from k3sagentd.control import ControlServer
from k3sagentd.core.k3s import Action, Order, Outcome, ServerOrAgent
from k3sagentd.errors import (
    ConfigError,
    K3sagentdError,
    MachineError,
    TimedOutError,
    UnavailableError,
    UsageError,
)
from k3sagentd.k3s import facts, install, underway
from k3sagentd.k3s.apply import apply
from k3sagentd.k3s.kube import Kube
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import leave, repair, service
from tests.unit.fake_api import FakeApi
from tests.unit.machine import AT, NEW, OLD, Server, row, status


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path / "root")
    monkeypatch.setattr(install, "PATH", f"{made.paths.root}/bin:{install.PATH}")
    return made


# --- asking ---------------------------------------------------------------------------------


def test_nothing_is_done_that_was_not_confirmed(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = server.files()
    with pytest.raises(UsageError, match="--yes"):
        operate.reset(server.paths, yes=False)
    assert "DELETED" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer in ("", "n", "yess"):
        monkeypatch.setattr("builtins.input", lambda _, said=answer: said)
        with pytest.raises(UsageError, match="nothing was done"):
            operate.reset(server.paths, yes=False)
    assert server.files() == before
    assert server.said == []
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    assert operate.reset(server.paths, yes=False) == 0


# --- reset ----------------------------------------------------------------------------------


def test_reset_makes_a_machine_as_it_was(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.paths.keepalived.write_text("# Written by k3sagentd for this node\nx\n")
    server.paths.order.write_text("{}")
    assert operate.reset(server.paths, yes=True) == 0
    assert set(server.files()) == {
        "etc/k3sagentd/config.yaml",
        "etc/k3sagentd/token",
        "etc/rancher/node/password",
    }
    assert not server.paths.order.exists()
    assert server.paths.state.is_dir()
    found = facts.read_facts(server.paths)
    assert found is not None
    assert found.facts.datastore == "none"
    assert server.said[0] == "stop k3sagentd.service"
    assert "uninstall" in server.said
    assert "stop keepalived.service" in server.said
    assert "systemctl start k3sagentd" in capsys.readouterr().out
    assert operate.reset(server.paths, yes=False) == 0
    assert capsys.readouterr().out == "nothing to reset\n"


def test_a_keepalived_of_somebody_else_stays(server: Server) -> None:
    server.paths.keepalived.write_text("# mine\n")
    assert operate.reset(server.paths, yes=True) == 0
    assert server.paths.keepalived.read_text() == "# mine\n"
    assert "stop keepalived.service" not in server.said


def named(server: Server, name: str, command: str) -> None:
    """K3s as its install script makes it with INSTALL_K3S_NAME."""
    system = server.paths.root / "etc/systemd/system"
    (system / f"{name}.service").write_text(f"[Service]\nExecStart={command}\n")
    uninstall = server.paths.root / f"usr/local/bin/{name}-uninstall.sh"
    text = f"#!/bin/sh\ncd {server.paths.root}\necho uninstall {name} >> said\n"
    uninstall.write_text(f"{text}rm $0 etc/systemd/system/{name}.service\n")
    uninstall.chmod(0o755)


def test_reset_stops_and_removes_k3s_by_whatever_name(server: Server) -> None:
    """Else it would start at the next boot, without its data: a second cluster."""
    named(server, "k3s-shop", "/usr/local/bin/k3s server --cluster-init")
    named(server, "k3s-edge", "/opt/bin/k3s agent")
    named(server, "k3s-backup", "/usr/local/bin/k3s etcd-snapshot save")
    (server.paths.root / "usr/local/bin/k3s-backup-uninstall.sh").unlink()
    assert operate.reset(server.paths, yes=True) == 0
    stopped = [line.split()[-1] for line in server.said if line.startswith("disable --now")]
    assert stopped == ["k3s.service", "k3s-edge.service", "k3s-shop.service"]
    assert {"uninstall", "uninstall k3s-shop", "uninstall k3s-edge"} <= {*server.said}
    assert server.said.index("disable --now k3s-shop.service") < server.said.index("uninstall")
    left = [name for name in server.files() if name.startswith(("etc/systemd", "usr/local"))]
    assert left == ["etc/systemd/system/k3s-backup.service"], "that is none of K3s's"


def test_a_k3s_that_was_there_before_is_named(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.paths.installed.unlink()
    operate.reset(server.paths, yes=True)
    assert "K3s was here before k3sagentd" in capsys.readouterr().out


def test_a_reset_that_fails_half_way_keeps_the_daemon_away(server: Server) -> None:
    script = server.paths.root / "usr/local/bin/k3s-uninstall.sh"
    good = script.read_text()
    script.write_text("#!/bin/sh\necho device busy; exit 1\n")
    with pytest.raises(MachineError, match=r"k3s-uninstall.sh ended with 1: device busy"):
        operate.reset(server.paths, yes=True)
    assert "run k3sagentd reset again" in server.paths.left.read_text()
    assert (server.paths.state / "node.key").exists()
    script.write_text(good)
    assert operate.reset(server.paths, yes=True) == 0
    assert not server.paths.left.exists()


def test_without_an_uninstall_script_the_data_is_moved_aside(tmp_path: Path) -> None:
    made = Server(tmp_path, method="exec")
    assert operate.reset(made.paths, yes=True) == 0
    aside = made.paths.k3s_data.with_name("k3s.reset")
    assert (aside / "server/db/etcd/name").exists()
    assert made.said == []  # the systemd that is seen from a lab's machine is its host's
    (made.paths.k3s_data / "server").mkdir(parents=True)
    assert operate.reset(made.paths, yes=True) == 0
    assert aside.with_name("k3s.reset-2").exists()


# --- the daemon -----------------------------------------------------------------------------


class Daemon:
    """Answers at the control socket, and notes what the machine was like then."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.errors: dict[str, str] = {}
        self.asked: list[tuple[str, bool]] = []

    async def status(self, after: int, wait_s: float) -> dict:
        return {"rev": 1, "status": status(row(2))}

    def registration(self) -> None:
        return None

    async def force(self) -> str | None:
        return "this node sees two clusters"

    async def leave(self, step: str) -> str | None:
        self.asked.append((step, (self._server.paths.root / "active").exists()))
        return self.errors.get(step)


@pytest.fixture
def daemon(server: Server) -> Iterator[Daemon]:
    made = Daemon(server)
    loop = asyncio.new_event_loop()
    control = ControlServer(server.paths.control, made)
    loop.run_until_complete(control.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield made
    asyncio.run_coroutine_threadsafe(control.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_daemon_that_nobody_can_stop_is_in_the_way(tmp_path: Path) -> None:
    made = Server(tmp_path, method="exec")
    before = made.files()

    async def scene() -> None:
        control = ControlServer(made.paths.control, Daemon(made))
        await control.start()
        with pytest.raises(UsageError, match="the daemon runs"):
            await asyncio.to_thread(operate.reset, made.paths, yes=True)
        await control.stop()

    asyncio.run(scene())
    assert made.files() == before


def test_who_listens_is_found(server: Server, daemon: Daemon) -> None:
    assert service.pid(server.paths) == os.getpid()
    assert service.pid(Paths(Path("/nonexistent"))) is None


def test_the_daemons_answer_to_a_forced_start_is_shown(
    server: Server, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnavailableError, match="this node sees two clusters"):
        operate.force(server.paths, yes=True)
    assert "there are two clusters for good" in capsys.readouterr().out


def test_only_two_steps_can_be_asked_for(server: Server, daemon: Daemon) -> None:
    from k3sagentd.control import ControlClient

    with pytest.raises(K3sagentdError, match="none of drain, remove"):
        asyncio.run(ControlClient(server.paths.control).leave("explode"))
    assert daemon.asked == []


# --- leave ----------------------------------------------------------------------------------


def test_leave_drains_stops_and_removes_in_this_order(server: Server, daemon: Daemon) -> None:
    assert operate.leave(server.paths, yes=True) == 0
    assert daemon.asked == [("drain", True), ("remove", False)]
    assert server.said == [
        "disable --now k3s.service",
        "reset-failed k3s.service",
        "stop k3sagentd.service",
    ]
    assert "has left its site" in server.paths.left.read_text()
    assert not server.paths.underway.exists()
    assert (server.paths.k3s_data / "server/db/etcd/name").exists()
    # Again: there is the daemon to stop, which answers here for ever, and nothing else.
    assert operate.leave(server.paths, yes=True) == 0
    assert daemon.asked == [("drain", True), ("remove", False)]


def test_leave_stops_k3s_by_whatever_name(server: Server, daemon: Daemon) -> None:
    (server.paths.root / "etc/systemd/system/k3s.service").unlink()
    named(server, "k3s-shop", "/usr/local/bin/k3s server")
    assert operate.leave(server.paths, yes=True) == 0
    assert server.said[:2] == ["disable --now k3s-shop.service", "reset-failed k3s-shop.service"]


def test_a_leave_that_is_refused_changes_nothing(server: Server, daemon: Daemon) -> None:
    daemon.errors["drain"] = "removing n1 would cost the quorum"
    before = server.files()
    with pytest.raises(UnavailableError, match="would cost the quorum"):
        operate.leave(server.paths, yes=True)
    assert server.files() == before
    assert server.said == []


def test_a_leave_goes_on_where_it_was(server: Server, daemon: Daemon) -> None:
    daemon.errors["remove"] = "no server answers"
    with pytest.raises(UnavailableError, match="no server answers"):
        operate.leave(server.paths, yes=True)
    assert not (server.paths.root / "active").exists()
    assert not server.paths.left.exists()
    daemon.errors.clear()
    assert operate.leave(server.paths, yes=True) == 0
    assert [step for step, _ in daemon.asked] == ["drain", "remove", "remove"]


@pytest.mark.parametrize("step", [leave.DRAINED, leave.STOPPED, leave.REMOVED])
def test_a_killed_leave_finishes(server: Server, daemon: Daemon, step: str) -> None:
    underway.save(server.paths, Progress(command="leave", step=step))
    assert operate.leave(server.paths, yes=True) == 0
    assert [each for each, _ in daemon.asked] == ([] if step == leave.REMOVED else ["remove"])
    assert server.paths.left.exists()
    assert not server.paths.underway.exists()


def test_a_silent_daemon_is_named_before_anything(server: Server) -> None:
    with pytest.raises(UnavailableError, match="the daemon does not answer"):
        operate.leave(server.paths, yes=True)
    assert (server.paths.root / "active").exists()


def test_no_order_touches_k3s_meanwhile(server: Server) -> None:
    underway.save(server.paths, Progress(command="leave", step=leave.STOPPED))
    before = server.files()
    order = Order(
        action=Action.JOIN,
        epoch=0,
        role=ServerOrAgent.SERVER,
        node_name="n1",
        servers=("https://127.0.0.2:6443",),
        ca_hash="a" * 64,
    )
    write_order(server.paths, order)
    assert apply(server.paths) == os.EX_TEMPFAIL
    result = read_result(server.paths)
    assert result is not None
    assert result.outcome is Outcome.FAILED
    assert "k3sagentd leave was not finished on this machine" in str(result.reason)
    assert server.files() == before
    with pytest.raises(MachineError, match="k3sagentd leave was not finished"):
        repair.plan(server.paths, load_config(server.paths), AT, status(row(2)))


def test_a_machine_that_left_runs_no_daemon_and_says_so(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.mark(server.paths, "this machine has left its site")
    monkeypatch.setattr(main, "Paths", lambda: server.paths)
    assert main.main(["run"]) == 0
    with pytest.raises(UnavailableError, match="does not run: this machine has left its site"):
        asyncio.run(ask.status(server.paths, as_json=False, watch=False))
    assert operate.reset(server.paths, yes=True) == 0
    assert not server.paths.left.exists()


# --- repair-addresses -----------------------------------------------------------------------


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


def test_a_node_that_others_have_taken_stays(server: Server, api: FakeApi) -> None:
    for name in ("n1", "n2"):
        api.add_node(name, server=True)
    progress = planned(server, status(READY2))
    api.add_node("n1", server=True)
    with pytest.raises(MachineError, match="another machine has taken its name"):
        repair.carry_out(server.paths, load_config(server.paths), progress, lambda _: None)
    assert "n1" in api.nodes
    assert underway.load(server.paths) == replace(progress, step=repair.STOP)


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
