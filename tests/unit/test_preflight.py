# SPDX-License-Identifier: Apache-2.0
"""What is looked at before K3s is installed: each check, its message, and what it does not mind."""

import email.utils
import socket
from pathlib import Path

import pytest

from k3sagentd import version
from k3sagentd.config import Config, load_config
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.k3s import clock, preflight
from k3sagentd.paths import Paths

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("name", ["k3s-agent", "k3s-shop"])
def test_somebody_elses_k3s_is_not_touched(paths: Paths, name: str) -> None:
    unit = paths.root / f"etc/systemd/system/{name}.service"
    unit.parent.mkdir(parents=True)
    unit.with_name("k3s-backup.service").write_text("[Service]\nExecStart=/bin/true\n")
    preflight.check_foreign(config(paths), paths)
    unit.write_text("[Service]\nExecStart=/usr/local/bin/k3s agent\n")
    with pytest.raises(HopelessError, match=rf"by somebody else \(.*{name}.service\)"):
        preflight.check_foreign(config(paths), paths)
    paths.installed.parent.mkdir(parents=True)
    paths.installed.touch()
    preflight.check_foreign(config(paths), paths)  # our own install, begun before


# --- the clock ------------------------------------------------------------------------------

BUILT_S = 1_800_000_000.0
DAY_S = 86400.0


class FakeClock(clock.Clock):
    """A clock that a test moves."""

    def __init__(
        self, now_s: float, *, synchronised: bool = False, rtcs_s: tuple[float, ...] = ()
    ) -> None:
        self.time_s, self.waits, self.was_set_to_s = now_s, 0, None
        self.up_s = 100.0
        self._synchronised, self._rtcs_s = synchronised, rtcs_s

    def now_s(self) -> float:
        return self.time_s

    def monotonic_s(self) -> float:
        return self.up_s

    def built_s(self) -> float:
        return BUILT_S

    def synchronised(self) -> bool:
        return self._synchronised

    def rtcs_s(self) -> list[float]:
        return list(self._rtcs_s)

    def set(self, to_s: float) -> None:
        self.was_set_to_s = self.time_s = to_s

    def sleep(self) -> None:
        self.waits += 1
        self.time_s += 1
        self.up_s += 1


def told(paths: Paths, subject: FakeClock, *clocks_s: float) -> None:
    """The daemon heard peers whose clocks say this now."""
    clock.write(paths, {str(i): each - subject.up_s for i, each in enumerate(clocks_s)})


@pytest.mark.parametrize(
    "good",
    [
        FakeClock(BUILT_S + DAY_S, synchronised=True),
        FakeClock(BUILT_S + DAY_S, rtcs_s=(BUILT_S + DAY_S + 1,)),
        FakeClock(BUILT_S + DAY_S, rtcs_s=(50.0, BUILT_S + DAY_S - 1)),
    ],
)
def test_a_clock_that_is_kept_is_not_waited_for(paths: Paths, good: FakeClock) -> None:
    assert list(clock.settle(paths, good)) == []
    assert good.was_set_to_s is None


def test_an_rtc_without_a_battery_keeps_nothing(paths: Paths) -> None:
    """Every Raspberry Pi 5 has an RTC: the system's clock is another, of the last shutdown."""
    subject = FakeClock(BUILT_S + DAY_S, rtcs_s=(50.0,))
    told(paths, subject, *[BUILT_S + 30 * DAY_S] * 2)
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s == BUILT_S + 30 * DAY_S


def test_certificates_are_not_made_in_1970(paths: Paths) -> None:
    for rtcs_s in ((), (100.0,)):
        subject = FakeClock(100.0, rtcs_s=rtcs_s)
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
    there_s = BUILT_S + 30 * DAY_S
    told(paths, subject, there_s, there_s + 5, 50.0)
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s == there_s + 5, "a time that a peer has"


def test_a_step_of_the_clock_meanwhile_is_not_made_twice(paths: Paths) -> None:
    """The file was written before; since then a time server, or we, set the clock."""
    subject = FakeClock(100.0)
    told(paths, subject, *[BUILT_S + DAY_S] * 3)
    subject.time_s = BUILT_S + DAY_S + 20
    subject.up_s += 20
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s is None


def test_peers_that_agree_are_enough(paths: Paths) -> None:
    subject = FakeClock(BUILT_S + DAY_S)
    told(paths, subject, BUILT_S + DAY_S + 3, BUILT_S + DAY_S - 2)
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s is None


@pytest.mark.parametrize(
    "ahead_s",
    [
        (DAY_S, 9 * DAY_S),  # they disagree
        (DAY_S, 9 * DAY_S, 99 * DAY_S),
        (DAY_S, -BUILT_S, -BUILT_S),  # two of them are in 1970
        (DAY_S, DAY_S, -BUILT_S, -BUILT_S),  # half is not more than half
        (clock.FUTURE_LIMIT_S + DAY_S,) * 3,
        (clock.LONE_LIMIT_S + DAY_S,),  # one alone, and far ahead
        (-DAY_S,) * 3,  # no clock is behind the build
        (-BUILT_S + 100,) * 3,
    ],
)
def test_peers_that_cannot_be_right_set_no_clock(paths: Paths, ahead_s: tuple[float, ...]) -> None:
    subject = FakeClock(100.0)
    told(paths, subject, *(BUILT_S + each for each in ahead_s))
    with pytest.raises(MachineError):
        list(clock.settle(paths, subject))
    assert subject.was_set_to_s is None


@pytest.mark.parametrize(
    "ahead_s",
    [
        (DAY_S,),
        (DAY_S, DAY_S + 50, 9 * DAY_S),
        (clock.FUTURE_LIMIT_S - DAY_S,) * 2,
    ],
)
def test_most_peers_are_enough(paths: Paths, ahead_s: tuple[float, ...]) -> None:
    subject = FakeClock(100.0)
    told(paths, subject, *(BUILT_S + each for each in ahead_s))
    assert list(clock.settle(paths, subject)) == []
    assert subject.was_set_to_s in [BUILT_S + each for each in ahead_s]


def test_peers_do_not_set_the_clock_back(paths: Paths) -> None:
    """A time server may; until then nobody knows which is right."""
    subject = FakeClock(BUILT_S + 40 * DAY_S)
    told(paths, subject, *[BUILT_S + 20 * DAY_S] * 3)
    assert len(list(clock.settle(paths, subject))) == clock.WAIT_S
    assert subject.was_set_to_s is None


def test_a_plausible_clock_is_taken_in_the_end(paths: Paths, caplog) -> None:
    subject = FakeClock(BUILT_S + DAY_S)
    assert len(list(clock.settle(paths, subject))) == clock.WAIT_S
    assert "taken as it is" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"at_boot_s": []}',
        '{"at_boot_s": [NaN, 1]}',
        '{"at_boot_s": [1e999]}',
        '{"at_boot_s": [1, true]}',
        f'{{"at_boot_s": [{"9" * 400}]}}',
        f'{{"at_boot_s": [1{",1" * clock.PEERS_LIMIT}]}}',
        f'{{"at_boot_s": [1]{" " * clock.LIMIT_BYTES}}}',
    ],
)
def test_a_clock_file_that_makes_no_sense_counts_for_nothing(paths: Paths, text: str) -> None:
    paths.clock.write_text(text)
    assert clock.read(paths) is None


def test_a_large_site_fits_into_the_file(paths: Paths) -> None:
    clock.write(paths, {str(i): BUILT_S * 1.5 + i / 7 for i in range(500)})
    found = clock.read(paths)
    assert found is not None
    assert len(found.at_boot_s) == clock.PEERS_LIMIT


def test_the_build_is_dated_by_the_changelog_not_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = clock.Clock()
    dated_s = real.built_s()
    last = (ROOT / "debian/changelog").read_text().partition("\n -- ")[2].splitlines()[0]
    assert dated_s == email.utils.parsedate_to_datetime(last.rpartition("  ")[2]).timestamp()
    # Installed: the checkout's changelog is not there, the build wrote the date down.
    monkeypatch.setattr(version, "CHANGELOG", tmp_path / "none")
    monkeypatch.setattr(version, "BUILT", tmp_path / "built")
    (tmp_path / "built").write_text("1800000000\n")
    assert real.built_s() == 1_800_000_000


def test_a_check_can_be_left_out(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    (paths.root / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    monkeypatch.setattr(preflight, "attachment", lambda *_: object())
    every = config(paths, "ignore-preflight: [foreign, cgroup, memory, disk, ports, clock]\n")
    assert list(preflight.preflight(every, paths, SERVER, FakeClock(0.0))) == []
    some = config(paths, "ignore-preflight: [foreign, cgroup, disk, ports, clock]\n")
    with pytest.raises(HopelessError, match="memory"):
        list(preflight.preflight(some, paths, SERVER, FakeClock(0.0)))
