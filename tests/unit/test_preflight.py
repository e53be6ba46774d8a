# SPDX-License-Identifier: Apache-2.0
"""What is looked at before K3s is installed: each check, its message, and what it does not mind."""

import socket
from pathlib import Path

import pytest

from k3sagentd.config import Config, load_config
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.k3s import clock, preflight
from k3sagentd.paths import Paths

SERVER, AGENT = ServerOrAgent.SERVER, ServerOrAgent.AGENT


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    for each in (found.config.parent, found.run, found.k3s_data, tmp_path / "proc"):
        each.mkdir(parents=True)
    return found


def config(paths: Paths, text: str = "") -> Config:
    paths.config.write_text(f"nodes: 3\n{text}")
    return load_config(paths)


# --- memory cgroup --------------------------------------------------------------------------


@pytest.fixture
def pi(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A Raspberry Pi whose firmware turns the memory cgroup off."""
    controllers = paths.root / "sys/fs/cgroup/cgroup.controllers"
    controllers.parent.mkdir(parents=True)
    controllers.write_text("cpuset cpu io pids\n")
    paths.cmdlines[0].parent.mkdir(parents=True)
    paths.cmdlines[0].write_text("console=tty1 root=PARTUUID=1-02 rootwait\n")
    reboots = paths.root / "reboots"
    monkeypatch.setattr(preflight.subprocess, "run", lambda *a, **_: reboots.write_text(str(a)))
    return paths


def test_without_memory_cgroup_it_says_the_word_and_the_file(pi: Paths) -> None:
    before = pi.cmdlines[0].read_text()
    with pytest.raises(HopelessError, match=r"add cgroup_enable=memory to .*/firmware/cmdline.txt"):
        preflight.check_cgroup(config(pi), pi)
    assert pi.cmdlines[0].read_text() == before


def test_the_word_is_added_once_and_a_reboot_is_asked_for(pi: Paths) -> None:
    fixing = config(pi, "fix-cmdline: true\n")
    for _ in range(2):
        with pytest.raises(HopelessError, match=r"reboot this machine, or set allow-reboot: true"):
            preflight.check_cgroup(fixing, pi)
    wanted = "console=tty1 root=PARTUUID=1-02 rootwait cgroup_enable=memory\n"
    assert pi.cmdlines[0].read_text() == wanted
    assert not (pi.root / "reboots").exists()


def test_it_reboots_only_when_allowed_and_only_once(pi: Paths) -> None:
    allowed = config(pi, "fix-cmdline: true\nallow-reboot: true\n")
    with pytest.raises(MachineError, match="this machine reboots") as caught:
        preflight.check_cgroup(allowed, pi)
    assert not isinstance(caught.value, HopelessError)
    assert "reboot" in (pi.root / "reboots").read_text()
    (pi.root / "reboots").unlink()
    with pytest.raises(HopelessError, match="the kernel does not heed it"):
        preflight.check_cgroup(allowed, pi)
    assert not (pi.root / "reboots").exists()
    # It worked after all; should a later kernel forget it, one more reboot is allowed.
    controllers = pi.root / "sys/fs/cgroup/cgroup.controllers"
    before = controllers.read_text()
    controllers.write_text("cpu memory\n")
    preflight.check_cgroup(allowed, pi)
    controllers.write_text(before)
    with pytest.raises(MachineError, match="this machine reboots"):
        preflight.check_cgroup(allowed, pi)


def test_a_command_line_of_more_lines_is_left_alone(pi: Paths) -> None:
    pi.cmdlines[0].write_text("one\ntwo\n")
    with pytest.raises(HopelessError, match="more than one line"):
        preflight.check_cgroup(config(pi, "fix-cmdline: true\n"), pi)
    assert pi.cmdlines[0].read_text() == "one\ntwo\n"


def test_with_memory_cgroup_there_is_nothing_to_say(pi: Paths) -> None:
    (pi.root / "sys/fs/cgroup/cgroup.controllers").write_text("cpu memory pids\n")
    preflight.check_cgroup(config(pi), pi)


# --- room, ports, somebody else's K3s -------------------------------------------------------


def test_too_little_memory(paths: Paths) -> None:
    (paths.root / "proc/meminfo").write_text("MemTotal:         512000 kB\nMemFree: 1 kB\n")
    preflight.check_memory(paths, AGENT)
    with pytest.raises(HopelessError, match="has 500 MiB of memory; a K3s server needs 900 MiB"):
        preflight.check_memory(paths, SERVER)


def test_too_little_disk(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1500 * 2**20})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    preflight.check_disk(paths, AGENT)
    with pytest.raises(MachineError, match=r"1500 MiB are free below .*needs 2048 MiB"):
        preflight.check_disk(paths, SERVER)
    (paths.k3s_data / "server/db/etcd/member/wal").mkdir(parents=True)
    preflight.check_disk(paths, SERVER)  # what runs there already goes on


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_port_in_use(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, kind: str, family: socket.AddressFamily
) -> None:
    with socket.socket(family, getattr(socket, f"SOCK_{_KINDS[kind]}")) as other:
        other.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        if kind == "tcp":
            other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(preflight, "TCP_PORTS", {SERVER: (port,) if kind == "tcp" else ()})
        monkeypatch.setattr(preflight, "VXLAN_PORT", port if kind == "udp" else 1)
        with pytest.raises(MachineError, match=f"needed by K3s: {port}/{kind}; ss .*:{port}'"):
            preflight.check_ports(paths, SERVER)
    preflight.check_ports(paths, SERVER)


_KINDS = {"tcp": "STREAM", "udp": "DGRAM"}


def test_the_ports_are_those_of_k3s() -> None:
    assert preflight.TCP_PORTS[SERVER] == (6443, 2379, 2380, 10250)
    assert preflight.TCP_PORTS[AGENT] == (10250,)
    assert preflight.VXLAN_PORT == 8472


def test_somebody_elses_k3s_is_not_touched(paths: Paths) -> None:
    unit = paths.root / "etc/systemd/system/k3s-agent.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    with pytest.raises(HopelessError, match=r"by somebody else \(.*k3s-agent.service\)"):
        preflight.check_foreign(config(paths), paths)
    paths.installed.parent.mkdir(parents=True)
    paths.installed.touch()
    preflight.check_foreign(config(paths), paths)  # our own install, begun before


# --- the clock ------------------------------------------------------------------------------

BUILT_S = 1_800_000_000.0
DAY_S = 86400.0


class FakeClock(clock.Clock):
    """A clock that a test moves."""

    def __init__(self, now_s: float, *, synchronised: bool = False, rtc: bool = False) -> None:
        self.time_s, self.waits, self.was_set_to_s = now_s, 0, None
        self._synchronised, self._rtc = synchronised, rtc

    def now_s(self) -> float:
        return self.time_s

    def built_s(self) -> float:
        return BUILT_S

    def synchronised(self) -> bool:
        return self._synchronised

    def has_rtc(self) -> bool:
        return self._rtc

    def set(self, to_s: float) -> None:
        self.was_set_to_s = self.time_s = to_s

    def sleep(self) -> None:
        self.waits += 1
        self.time_s += 1


@pytest.mark.parametrize(
    "good",
    [
        FakeClock(BUILT_S + DAY_S, synchronised=True),
        FakeClock(BUILT_S + DAY_S, rtc=True),
    ],
)
def test_a_clock_that_is_kept_is_not_waited_for(paths: Paths, good: FakeClock) -> None:
    assert list(clock.settle(paths, good)) == []
    assert good.was_set_to_s is None


def test_certificates_are_not_made_in_1970(paths: Paths) -> None:
    for rtc in (False, True):  # an RTC without a battery
        subject = FakeClock(100.0, rtc=rtc)
        with pytest.raises(MachineError, match="says 1970-01-01, before k3sagentd was built"):
            list(clock.settle(paths, subject))
        assert subject.waits == clock.WAIT_S


def test_the_time_server_may_come_late(paths: Paths) -> None:
    subject = FakeClock(100.0)
    for step in clock.settle(paths, subject):
        assert step == "wait for the clock to be set: it says 1970-01-01"
        subject._synchronised = subject.waits >= 5
    assert subject.waits == 6


def test_offline_the_median_of_the_peers_is_taken(paths: Paths) -> None:
    subject = FakeClock(100.0)
    ahead_s = BUILT_S + 30 * DAY_S
    clock.write(paths, {"a": ahead_s, "b": ahead_s + 5, "c": -50.0})
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s == pytest.approx(BUILT_S + 30 * DAY_S + 100)


def test_peers_that_agree_are_enough(paths: Paths) -> None:
    subject = FakeClock(BUILT_S + DAY_S)
    clock.write(paths, {"a": 3.0, "b": -2.0})
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s is None


def test_peers_do_not_set_the_clock_back_nor_before_the_build(paths: Paths) -> None:
    subject = FakeClock(BUILT_S + 40 * DAY_S)
    clock.write(paths, {"a": -20 * DAY_S})
    assert list(clock.settle(paths, subject)) == []
    subject = FakeClock(100.0)
    for far_s in (DAY_S, BUILT_S + 2 * clock.FUTURE_LIMIT_S):
        clock.write(paths, {"a": far_s})
        with pytest.raises(MachineError):
            list(clock.settle(paths, subject))
    assert subject.was_set_to_s is None


def test_a_plausible_clock_is_taken_in_the_end(paths: Paths, caplog) -> None:
    subject = FakeClock(BUILT_S + DAY_S)
    assert len(list(clock.settle(paths, subject))) == clock.WAIT_S
    assert "taken as it is" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{}", '{"peers": 0, "median_s": 1.0}', '{"peers": 2, "median_s": NaN}', "[1]"]
)
def test_a_clock_file_that_makes_no_sense_counts_for_nothing(paths: Paths, text: str) -> None:
    paths.clock.write_text(text)
    assert clock.read(paths) is None


def test_a_check_can_be_left_out(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    (paths.root / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    monkeypatch.setattr(preflight, "attachment", lambda *_: object())
    every = config(paths, "ignore-preflight: [foreign, cgroup, memory, disk, ports, clock]\n")
    assert list(preflight.preflight(every, paths, SERVER, FakeClock(0.0))) == []
    some = config(paths, "ignore-preflight: [foreign, cgroup, disk, ports, clock]\n")
    with pytest.raises(HopelessError, match="memory"):
        list(preflight.preflight(some, paths, SERVER, FakeClock(0.0)))
