# SPDX-License-Identifier: Apache-2.0
"""What keeps K3s from a start that would found a second cluster, with or without systemd."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from k3sagentd.k3s import dropin, supervise
from tests.unit.rooted import AS_SERVER, WAL, Machine

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "systemd/check-k3s"
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


def test_the_unit_runs_what_the_package_has_and_heeds_it() -> None:
    conf = (ROOT / "systemd/k3s.service.d/51-k3sagentd-removed.conf").read_text()
    (command,) = re.findall(r"^ExecStartPre=(/.+) %n$", conf, re.MULTILINE)
    installed = (ROOT / "debian/k3sagentd.install").read_text().splitlines()
    assert f"systemd/check-k3s {str(Path(command).parent).lstrip('/')}" in installed
    assert Path(command).name == SCRIPT.name
    assert os.access(SCRIPT, os.X_OK)
