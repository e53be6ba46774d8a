# SPDX-License-Identifier: Apache-2.0
"""What keeps K3s from a start that would found a second cluster, with or without systemd."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.k3s import Outcome
from k3sagentd.k3s import dropin, supervise
from tests.unit.rooted import AS_SERVER, HASH, INIT, ONE, SERVER, STATE, WAL, Machine

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, AFTER = ROOT / "systemd/check-k3s", ROOT / "systemd/after-k3s"
TOMBSTONE = "server/db/etcd/tombstone"


def check(m: Machine, unit: str = "k3s.service") -> str | None:
    """Why K3s may not start, in a line; None where it may."""
    ended = subprocess.run(
        [SCRIPT, unit, m.paths.root], check=False, capture_output=True, text=True
    )
    assert not ended.stderr
    assert (ended.returncode == 0) is (ended.stdout == "")
    assert ended.stdout.count("\n") <= 1
    return ended.stdout.strip() or None


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_k3s_starts_with_its_data_and_without_any(m: Machine) -> None:
    assert check(m) is None
    m.put(*AS_SERVER, WAL)
    assert check(m) is None
    m.paths.dropin.write_bytes(dropin.render({"cluster-init": True}))
    assert check(m) is None


@pytest.mark.parametrize("told", [True, False])
def test_a_server_that_etcd_removed_does_not_start_whoever_set_it_up(
    m: Machine, told: bool
) -> None:
    m.put(*AS_SERVER, WAL, TOMBSTONE)
    if told:
        m.paths.dropin.write_bytes(dropin.render({"cluster-init": True}))
    assert "etcd removed this server" in str(check(m))
    assert "etcd removed this server" in str(check(m, "k3s-mine.service"))
    assert check(m, "k3s-agent.service") is None, "an agent has no etcd"


@pytest.mark.parametrize(("role", "starts"), [("server", 0), ("agent", 1)])
def test_the_lab_does_not_start_it_either(
    m: Machine, monkeypatch: pytest.MonkeyPatch, role: str, starts: int
) -> None:
    m.put(*AS_SERVER, WAL, TOMBSTONE)
    found: list[object] = []
    monkeypatch.setattr(supervise, "_run_once", lambda *each: found.append(each))
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)

    def ends(_: float) -> None:
        raise SystemExit

    monkeypatch.setattr(supervise.time, "sleep", ends)
    with pytest.raises(SystemExit):
        supervise._supervise(m.paths, Path("/bin/true"), role)
    assert len(found) == starts


# --- data that is not there -----------------------------------------------------------------


def after(m: Machine) -> None:
    """K3s is ready."""
    subprocess.run([AFTER, m.paths.root], check=True)


def unmount(m: Machine) -> None:
    """CA and token are on the card, etcd is on a disk that does not come."""
    (m.paths.k3s_data / "server/db/etcd").rename(m.paths.root / "disk")


@pytest.fixture
def only(m: Machine) -> Machine:
    """The only server of its cluster, which is told ``cluster-init`` at each start."""
    m.does(INIT, "install server", "start server")
    m.put(*AS_SERVER, WAL)
    return m


def test_an_only_server_without_its_disk_does_not_start(only: Machine) -> None:
    """It would be a new and empty etcd under the CA and token that are still there."""
    after(only)
    assert check(only) is None
    unmount(only)
    assert "etcd is not there any more: mount its disk" in str(check(only))
    (only.paths.root / "disk").rename(only.paths.k3s_data / "server/db/etcd")
    assert check(only) is None


def test_a_first_start_that_was_cut_off_begins_again(only: Machine) -> None:
    unmount(only)
    after(only)
    assert not only.paths.served.exists()
    assert check(only) is None


def test_sqlite_that_is_there_is_converted(only: Machine) -> None:
    after(only)
    unmount(only)
    only.put(STATE)
    assert check(only) is None


def test_who_is_told_of_others_joins_them(only: Machine) -> None:
    after(only)
    unmount(only)
    only.paths.dropin.write_bytes(dropin.render({"server": ONE}))
    assert check(only) is None


def test_what_was_ready_before_is_noted_and_forgotten_when_a_cluster_is_founded(
    only: Machine,
) -> None:
    after(only)
    after(only)
    assert only.paths.served.stat().st_size == 0
    only.paths.k3s_data.rename(only.paths.root / "aside")
    only.k3s.role = None
    only.does(INIT, "install server", "start server")
    assert not only.paths.served.exists()
    assert check(only) is None


def test_k3s_that_is_not_ours_is_not_noted(m: Machine) -> None:
    m.put(*AS_SERVER, WAL)
    after(m)
    assert not m.paths.served.exists()


@pytest.mark.parametrize("left", [(), AS_SERVER])
def test_an_order_does_not_found_what_was_sealed_again(m: Machine, left: tuple[str, ...]) -> None:
    m.put(*left)
    m.ours(SERVER)
    before = m.files()
    result = m.apply(replace(INIT, ca_hash=HASH))
    assert result.outcome is Outcome.FAILED
    assert "its data is not in" in str(result.reason)
    assert (m.files(), m.k3s.did) == (before, [])


# --- the package ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop_in", "line", "script"),
    [
        ("51-k3sagentd-removed.conf", r"^ExecStartPre=(/.+) %n$", SCRIPT),
        ("54-k3sagentd-served.conf", r"^ExecStartPost=-(/.+)$", AFTER),
    ],
)
def test_the_unit_runs_what_the_package_has(drop_in: str, line: str, script: Path) -> None:
    """A check that fails is heeded, a note that cannot be made is not."""
    conf = (ROOT / "systemd/k3s.service.d" / drop_in).read_text()
    (command,) = re.findall(line, conf, re.MULTILINE)
    installed = (ROOT / "debian/k3sagentd.install").read_text().splitlines()
    assert f"systemd/{script.name} {str(Path(command).parent).lstrip('/')}" in installed
    assert Path(command).name == script.name
    assert os.access(script, os.X_OK)
