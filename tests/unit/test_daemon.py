# SPDX-License-Identifier: Apache-2.0
"""The shell: effects in order, the disk before the wire."""

import asyncio
import email.utils
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from k3sagentd import store
from k3sagentd.core import machine, status
from k3sagentd.core.effects import Persist, Report, Send
from k3sagentd.core.k3s import Outcome
from k3sagentd.core.messages import Fetch
from k3sagentd.core.state import Durable, Site
from k3sagentd.core.words import NodeId, NodePhase, Role
from k3sagentd.daemon import run as daemon
from k3sagentd.daemon.drive import Drive
from k3sagentd.daemon.engine import Engine
from k3sagentd.daemon.links import Links
from k3sagentd.daemon.run import label
from k3sagentd.errors import MachineError
from k3sagentd.k3s import clock
from k3sagentd.k3s.order import NAME
from k3sagentd.paths import Paths
from k3sagentd.peer.client import Reply

ROOT = Path(__file__).resolve().parents[2]
ME, YOU = NodeId("a" * 32), NodeId("b" * 32)


@pytest.mark.parametrize(
    ("hostname", "wanted"),
    [
        ("pi", "pi"),
        ("Pi_4.lan", "pi-4"),
        ("-x-", "x"),
        ("___", "node"),
        ("a" * 80, "a" * 63),
    ],
)
def test_any_hostname_becomes_a_label(hostname: str, wanted: str) -> None:
    assert label(hostname) == wanted
    assert NAME.fullmatch(wanted)


def test_facts_that_do_not_come_end_the_run_before_the_watchdog_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = (ROOT / "systemd/k3sagentd.service").read_text()
    watchdog = re.search(r"^WatchdogSec=(\d+)s$", unit, re.MULTILINE)
    assert watchdog is not None
    assert int(watchdog[1]) >= 2 * daemon.FACTS_LIMIT_S
    assert "ExecStartPre=-+/usr/bin/k3sagentd facts" in unit, "what the next start is for"
    assert MachineError.exit_code != 78, "with which the unit would not start again"
    monkeypatch.setattr(daemon, "FACTS_LIMIT_S", 0.05)
    monkeypatch.setattr(daemon, "FACTS_POLL_S", 0.01)
    with pytest.raises(MachineError, match=r"facts.json is not there .* k3sagentd facts"):
        asyncio.run(daemon._facts(Paths(tmp_path)))


def test_facts_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "FACTS_POLL_S", 0.01)
    answers = [None, None, "facts"]
    monkeypatch.setattr(daemon, "read_facts", lambda _: answers.pop(0))
    assert asyncio.run(daemon._facts(Paths(tmp_path))) == "facts"


def test_a_peers_clock_is_kept_by_the_clock_that_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, _ = engine(tmp_path)
    links = Links(subject, None, 1.0)
    there_s = 1_800_000_000
    links._heard_clock(Reply(YOU, {}, email.utils.formatdate(there_s, usegmt=True)))
    links._heard_clock(Reply(ME, {}, "yesterday"))
    at_boot_s = there_s - time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert links.clocks() == {YOU: pytest.approx(at_boot_s, abs=5)}
    paths = Paths(tmp_path)
    paths.run.mkdir(parents=True)
    clock.write(paths, links.clocks())
    found = clock.read(paths)
    assert found is not None
    assert clock.agreed(found, time.monotonic(), there_s - 60.0) == pytest.approx(there_s, abs=5)


def test_k3s_is_looked_at_as_soon_as_it_is_to_change(tmp_path: Path) -> None:
    drive = SimpleNamespace(order=object(), outcome=Outcome.DONE)
    joining, ready = (
        SimpleNamespace(phase=phase, drive=drive, facts=None)
        for phase in (NodePhase.JOINING, NodePhase.READY)
    )
    at = SimpleNamespace(node=joining)
    subject = Drive(at, Paths(tmp_path), (), dict)
    looks = []

    async def look() -> None:
        looks.append(at.node.phase)
        at.node = ready

    async def looked(times: int) -> None:
        async with asyncio.timeout(10):
            while len(looks) < times:
                await asyncio.sleep(0.001)

    async def follow() -> None:
        task = asyncio.create_task(subject.run())
        await looked(1)
        assert looks == [NodePhase.JOINING]
        # Hardly ready, the machine is told to be something else.
        at.node = joining
        subject.wake()
        await looked(2)
        assert looks == [NodePhase.JOINING] * 2
        task.cancel()

    subject._probe = look
    asyncio.run(follow())


class Wire:
    """Notes what leaves, and what was on the disk then."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.sent: list[Durable] = []

    def send(self, to: NodeId, message: object) -> None:
        self.sent.append(store.load(self.state, ME))

    def announce(self, hello: object) -> None:
        pass

    def order(self, order: object) -> None:
        pass


def engine(tmp_path: Path) -> tuple[Engine, Wire]:
    site = Site(nodes=3, servers=3, role=Role.AUTO, election_key=b"k", hostname="n", instance="i")
    durable = Durable(node=ME)
    store.save(tmp_path, durable)
    wire = Wire(tmp_path)
    node = machine.new_node(site, durable, time.monotonic())
    return Engine(node, tmp_path, wire), wire


def test_nothing_leaves_before_the_disk_has_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("k3sagentd.daemon.engine.PERSIST_RETRY_S", 0.05)
    subject, wire = engine(tmp_path)
    voted = Durable(node=ME, nodes=3)
    effects = (Persist(durable=voted), Send(to=YOU, message=Fetch(first=0)), Report(text="x"))
    real, failures = store.save, [OSError(28, "No space left on device")] * 3

    def save(directory: Path, durable: Durable) -> None:
        if failures:
            assert not wire.sent, "it left before the disk had it"
            raise failures.pop()
        real(directory, durable)

    monkeypatch.setattr(store, "save", save)

    async def run() -> None:
        for effect in effects:
            await subject._do(effect)

    asyncio.run(run())
    assert not failures
    assert wire.sent == [voted]


def test_a_full_disk_is_told_and_its_end_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("k3sagentd.daemon.engine.PERSIST_RETRY_S", 0.05)
    subject, _ = engine(tmp_path)
    failures = [OSError(30, "Read-only file system")] * 2
    said = []

    def save(directory: Path, durable: Durable) -> None:
        said.append(status.waiting_for(subject.node, time.monotonic()))
        if failures:
            raise failures.pop()

    monkeypatch.setattr(store, "save", save)

    async def run() -> None:
        await subject._do(Persist(durable=Durable(node=ME)))

    asyncio.run(run())
    assert "a disk that takes its state: Read-only file system" in str(said[1]), said
    kinds = [type(event).__name__ for event, _ in subject._queue]
    assert kinds == ["PersistRecovered"]
