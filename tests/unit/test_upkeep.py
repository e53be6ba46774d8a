# SPDX-License-Identifier: Apache-2.0
"""Leave and reset, step by step, on a root directory."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k3sagentd.cli import ask, main, operate
from k3sagentd.config import load_config
from k3sagentd.control import ControlServer
from k3sagentd.core.k3s import Action, Order, Outcome, ServerOrAgent
from k3sagentd.errors import (
    BusyError,
    K3sagentdError,
    MachineError,
    UnavailableError,
    UsageError,
)
from k3sagentd.k3s import facts, underway
from k3sagentd.k3s.apply import apply
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import leave, repair, service
from tests.unit.machine import AT, Daemon, Server, row, status

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


def test_only_its_steps_can_be_asked_for(server: Server, daemon: Daemon) -> None:
    from k3sagentd.control import ControlClient

    with pytest.raises(K3sagentdError, match="none of drain, stop, remove"):
        asyncio.run(ControlClient(server.paths.control).leave("explode"))
    assert daemon.asked == []


# --- one at a time --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["leave", "repair_addresses", "reset"])
def test_who_comes_while_another_is_asked_is_sent_away_at_once(
    server: Server, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    command: Callable[..., int] = getattr(operate, name)
    # Half done: what both would load before they ask.
    if name != "reset":
        progress = Progress(command=name.replace("_", "-"), step="", name="n1", uid="gone")
        underway.save(server.paths, progress)
    before = server.files()
    asked = []

    def answer(_: str) -> str:
        asked.append(name)
        for other in (operate.leave, operate.repair_addresses, operate.reset):
            with pytest.raises(BusyError, match="wait until it has ended, or end it") as caught:
                other(server.paths, yes=True)
            held = f"k3sagentd {name.replace('_', '-')} (pid {os.getpid()}"
            assert str(caught.value).startswith(held)
            assert caught.value.exit_code == os.EX_TEMPFAIL
        return "n"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    for times in (1, 2):
        with pytest.raises(UsageError, match="nothing was done"):
            command(server.paths, yes=False)
        assert len(asked) == times, "the lock is given back"
    assert server.files() == before
    assert server.said == []


HOLD = """
import sys
from pathlib import Path
from k3sagentd.k3s import underway
from k3sagentd.paths import Paths
with underway.only(Paths(Path(sys.argv[1])), "leave"):
    print(1, flush=True)
    input()
"""


def test_the_lock_goes_with_its_holder(server: Server) -> None:
    command = [sys.executable, "-c", HOLD, str(server.paths.root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BusyError, match=rf"k3sagentd leave \(pid {holder.pid}"):
            operate.reset(server.paths, yes=True)
        holder.kill()
    assert operate.reset(server.paths, yes=True) == 0


# --- leave ----------------------------------------------------------------------------------


def test_leave_drains_stops_and_removes_in_this_order(server: Server, daemon: Daemon) -> None:
    assert operate.leave(server.paths, yes=True) == 0
    assert daemon.asked == [("drain", True), ("stop", True), ("remove", False)]
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
    assert daemon.asked == [("drain", True), ("stop", True), ("remove", False)]


def test_leave_says_what_it_waits_for_and_once(
    server: Server,
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(leave, "LOOK_S", 0.01)
    daemon.view["node"]["leaving"] = "n2: pods to be evicted: web-1"
    daemon.answers_after_s = 0.5
    assert operate.leave(server.paths, yes=True) == 0
    said = capsys.readouterr().out
    assert said.count("- waits for n2: pods to be evicted: web-1\n") == 3, "once for each step"


def test_leave_stops_k3s_by_whatever_name(server: Server, daemon: Daemon) -> None:
    (server.paths.root / "etc/systemd/system/k3s.service").unlink()
    named(server, "k3s-shop", "/usr/local/bin/k3s server")
    assert operate.leave(server.paths, yes=True) == 0
    assert server.said[:2] == ["disable --now k3s-shop.service", "reset-failed k3s-shop.service"]


@pytest.mark.parametrize("step", ["drain", "stop"])
def test_a_leave_that_is_refused_changes_nothing(server: Server, daemon: Daemon, step: str) -> None:
    daemon.errors[step] = "removing n1 would cost the quorum"
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
    assert [step for step, _ in daemon.asked] == ["drain", "stop", "remove", "remove"]


@pytest.mark.parametrize(
    ("step", "asked"),
    [
        (leave.DRAINED, [("stop", True), ("remove", False)]),
        (leave.STOPPED, [("remove", True)]),
        (leave.REMOVED, []),
    ],
)
def test_a_killed_leave_finishes(
    server: Server, daemon: Daemon, step: str, asked: list[tuple[str, bool]]
) -> None:
    """And stops K3s by a new word only: much may have happened since the one it had."""
    underway.save(server.paths, Progress(command="leave", step=step))
    assert operate.leave(server.paths, yes=True) == 0
    assert daemon.asked == asked
    assert server.paths.left.exists()
    assert not server.paths.underway.exists()


def test_a_killed_leave_is_refused_while_k3s_here_is_needed(server: Server, daemon: Daemon) -> None:
    underway.save(server.paths, Progress(command="leave", step=leave.DRAINED))
    daemon.errors["stop"] = "removing n1 would cost the quorum"
    before = server.files()
    with pytest.raises(UnavailableError, match="would cost the quorum"):
        operate.leave(server.paths, yes=True)
    assert server.files() == before, "it goes on from there"
    assert server.said == []
    daemon.errors.clear()
    assert operate.leave(server.paths, yes=True) == 0


def test_what_has_stopped_needs_no_word_that_it_may(server: Server, daemon: Daemon) -> None:
    """Killed between the stop and its note. Who is off is a member still, so nobody would say so
    while the others are too few; and K3s must not start at a boot any more."""
    underway.save(server.paths, Progress(command="leave", step=leave.DRAINED))
    (server.paths.root / "active").unlink()
    daemon.errors["stop"] = "removing n1 would cost the quorum"
    assert operate.leave(server.paths, yes=True) == 0
    assert daemon.asked == [("remove", False)]
    assert server.said[0] == "disable --now k3s.service"


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
