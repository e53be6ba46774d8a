# SPDX-License-Identifier: Apache-2.0
"""A conversion that a power cut ended: what K3s finds when it starts, by its unit and without."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from k3sagentd.core.k3s import Outcome
from k3sagentd.errors import ConfigError
from k3sagentd.k3s import adopt, dropin, incomplete, supervise
from k3sagentd.paths import Paths
from tests.unit.rooted import (
    AS_SERVER,
    CA,
    HASH,
    INIT,
    SERVER,
    STATE,
    TOKEN,
    WAL,
    Machine,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "systemd/before-k3s"
Before = Callable[[Paths], None]


def by_its_unit(paths: Paths) -> None:
    """As systemd runs it, where a failure would be passed over: it has none."""
    subprocess.run([SCRIPT, paths.root], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(params=[by_its_unit, incomplete.clear_the_way])
def before(request: pytest.FixtureRequest) -> Before:
    return request.param


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """K3s has copied a part, and our drop-in has it convert."""
    made = Machine(tmp_path, monkeypatch)
    made.put(*AS_SERVER, STATE, WAL)
    (made.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:{TOKEN}\n")
    made.paths.converting.parent.mkdir(parents=True)
    made.paths.converting.touch()
    made.paths.dropin.write_bytes(dropin.render({"cluster-init": True}))
    made.paths.dropin.chmod(0o600)
    return made


def db(m: Machine) -> set[str]:
    return {each.name for each in (m.paths.k3s_data / "server/db").iterdir()}


def test_the_part_goes_aside_and_k3s_converts_from_the_whole(m: Machine, before: Before) -> None:
    before(m.paths)
    assert db(m) == {"state.db", "etcd.incomplete"}
    assert (m.paths.k3s_data / "server/db/etcd.incomplete/member/wal").is_dir()
    before(m.paths)
    m.put(WAL)
    before(m.paths)
    assert db(m) == {"state.db", "etcd.incomplete", "etcd.incomplete-2"}
    assert m.said() == {"cluster-init": True}
    assert (m.paths.k3s_data / STATE).read_bytes() == CA


@pytest.mark.parametrize("gone", ["converting", STATE, WAL])
def test_where_nothing_was_cut_short_nothing_is_done(m: Machine, before: Before, gone: str) -> None:
    """Not ours; K3s has ended it; it has not begun."""
    if gone == "converting":
        m.paths.converting.unlink()
    elif gone == STATE:
        (m.paths.k3s_data / STATE).rename(m.paths.k3s_data / f"{STATE}.migrated")
    else:
        (m.paths.k3s_data / "server/db/etcd").rename(m.paths.k3s_data / "server/db/etcd.removed")
    there = m.files()
    before(m.paths)
    assert m.files() == there


def test_on_a_machine_without_k3s_nothing_is_done(tmp_path: Path, before: Before) -> None:
    before(Paths(tmp_path))
    assert not list(tmp_path.iterdir())


def test_after_the_last_attempt_k3s_goes_on_with_sqlite(m: Machine, before: Before) -> None:
    """Each leaves its part, and what is wrong with one row is wrong with it each time."""
    more = {"cluster-init": True, "node-name": "n1"}
    m.paths.dropin.write_bytes(dropin.render(more))
    for number in range(1, incomplete.LIMIT + 1):
        assert m.said() == more, number
        before(m.paths)
        assert incomplete.attempts(m.paths) == number
        m.put(WAL)
    assert m.said() == {"node-name": "n1"}
    assert m.paths.dropin.stat().st_mode & 0o777 == 0o600
    m.paths.dropin.unlink()
    before(m.paths)  # whatever is missing
    assert "etcd" not in db(m)


def test_an_order_says_that_it_was_tried_too_often(m: Machine) -> None:
    m.k3s.role = SERVER
    for _ in range(incomplete.LIMIT):
        incomplete.clear_the_way(m.paths)
        m.put(WAL)
    (m.paths.k3s_data / "server/db/etcd").rename(m.paths.k3s_data / "server/db/other")
    m.refuses(INIT, "began 5 times to convert its data from SQLite to etcd and did not end")
    for part in (m.paths.k3s_data / "server/db").glob("etcd.incomplete*"):
        part.rename(m.paths.root / part.name)
    m.does(INIT, "halt", "start server as it is")


def test_an_order_is_told_while_its_unit_tries_again_and_again(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    m.k3s.converts = False

    def pings() -> bool:
        by_its_unit(m.paths)
        m.put(WAL)
        return False

    m.k3s.role = SERVER
    monkeypatch.setattr("k3sagentd.k3s.convert.pings", pings)
    result = m.apply(INIT)
    assert result.outcome is Outcome.FAILED_FOR_GOOD
    assert "began 5 times" in str(result.reason)
    assert not m.said()


def test_it_is_noted_before_k3s_is_told_to_convert(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else K3s, started by somebody else in between, would convert and nobody would know."""
    (m.paths.k3s_data / "server/db/etcd").rename(m.paths.root / "etcd")
    m.paths.converting.unlink()
    m.paths.dropin.unlink()
    m.k3s.role = SERVER
    noted = []
    write = adopt.write

    def spy(path: Path, content: bytes, mode: int) -> bool:
        noted.append((path, m.paths.converting.exists()))
        return write(path, content, mode)

    monkeypatch.setattr(adopt, "write", spy)
    m.does(INIT, "halt", "start server as it is")
    assert noted == [(m.paths.dropin, True)]
    assert not m.paths.converting.exists()


def test_what_it_is_not_told_is_not_noted(m: Machine) -> None:
    (m.paths.dropin.parent / "99.yaml").write_text("cluster-init: false\n")
    (m.paths.k3s_data / "server/db/etcd").rename(m.paths.root / "etcd")
    m.k3s.role = SERVER
    assert "cluster-init is False" in str(m.apply(INIT).reason)
    assert m.paths.converting.exists(), "what was noted before stays so"
    m.paths.converting.unlink()
    assert "cluster-init is False" in str(m.apply(INIT).reason)
    assert not m.paths.converting.exists()


def test_the_lab_looks_before_each_start_too(m: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[set[str]] = []
    monkeypatch.setattr(supervise, "_run_once", lambda *_: found.append(db(m)))
    monkeypatch.setattr(supervise, "RESTART_S", 0.0)
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)

    def ends(_: float) -> None:
        raise SystemExit

    monkeypatch.setattr(supervise.time, "sleep", ends)
    with pytest.raises(SystemExit):
        supervise._supervise(m.paths, Path("/bin/true"), "server")
    assert found == [{"state.db", "etcd.incomplete"}]


def test_the_unit_runs_what_the_package_has() -> None:
    conf = (ROOT / "systemd/k3s.service.d/52-k3sagentd-converting.conf").read_text()
    (command,) = re.findall(r"^ExecStartPre=-(.+)$", conf, re.MULTILINE)
    files = dict(
        line.split() for line in (ROOT / "debian/k3sagentd.install").read_text().splitlines()
        if "/before" in line
    )  # fmt: skip
    assert files == {"systemd/before-k3s": str(Path(command).parent).lstrip("/")}
    assert Path(command).name == SCRIPT.name
    assert os.access(SCRIPT, os.X_OK)
    assert f'"$number" -ge {incomplete.LIMIT}' in SCRIPT.read_text()


def test_a_wrong_file_of_the_operators_stops_nothing(m: Machine, before: Before) -> None:
    m.paths.dropin.write_text("[not: a mapping\n")
    before(m.paths)
    assert "etcd" not in db(m)
    with pytest.raises(ConfigError):
        dropin.present(m.paths)
