# SPDX-License-Identifier: Apache-2.0
"""The two files: an errand is taken once, checked as if an attacker wrote it, and answered."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.cluster import ClusterView, ErrandResult, Roster
from k3sagentd.core.k3s import Outcome
from k3sagentd.core.words import NodeId
from k3sagentd.daemon.errands import Errands
from k3sagentd.errors import DataError
from k3sagentd.k3s import errand as errands
from k3sagentd.k3s.errand import read_result, take_errand, write_errand, write_result
from k3sagentd.k3s.facts import read_facts
from k3sagentd.k3s.kube import Kube
from k3sagentd.paths import Paths
from tests.unit.fake_api import FakeApi
from tests.unit.kube.asked import (
    HOLD,
    LOOK,
    ME,
    UID,
    servers,
)


def test_an_errand_is_taken_once_and_answered(paths: Paths, api: FakeApi) -> None:
    write_errand(paths, HOLD)
    errands.run(paths)
    result = read_result(paths)
    assert result is not None
    assert (result.errand, result.outcome) == (HOLD, Outcome.DONE)
    assert not paths.errand.exists()
    # And the machine is looked at again: K3s has data by now.
    assert read_facts(paths) is not None
    errands.run(paths)
    assert sum(each.startswith("POST") for each in api.requests) == 1


FULL = replace(
    HOLD,
    lease_version="17",
    roster=Roster(revision=1, servers=(ME,), init=ME),
    drain="pi.lan",
    remove="pi.lan",
    uid=UID,
    release=True,
)


@pytest.mark.parametrize(
    "change",
    [
        {"serial": -1},
        {"serial": 10**9},
        {"instance": "../x"},
        {"node": "a" * 31},
        {"node": "A" * 32},
        {"lease_version": ""},
        {"lease_version": "1\n"},
        {"lease_version": "1" * 65},
        {"drain": "--all"},
        {"drain": "a b"},
        {"drain": ""},
        {"remove": "../secrets/x"},
        {"remove": "n1?x"},
        {"remove": "a" * 64},
        {"remove": ".".join(["a" * 60] * 5)},
        {"remove": "n1\n"},
        {"uid": None},
        {"uid": "x"},
        {"uid": UID + "\n"},
        {"roster": Roster(revision=-1, servers=(ME,), init=ME)},
        {"roster": Roster(revision=1, servers=(), init=ME)},
        {"roster": Roster(revision=1, servers=(NodeId("x"),), init=ME)},
        {"roster": Roster(revision=1, servers=(ME, ME), init=ME)},
        {"roster": Roster(revision=1, servers=(ME,), init=NodeId("x"))},
        {
            "roster": Roster(
                revision=1, servers=tuple(NodeId(f"{n:032x}") for n in range(100)), init=ME
            )
        },
        {"hold": False},
        {"hold": False, "roster": None, "drain": None, "remove": None},
        {"hold": False, "roster": None, "drain": None, "release": False},
        {"hold": False, "roster": None, "remove": None, "release": False},
    ],
)
def test_bad_errands_are_refused_and_gone(paths: Paths, change: dict) -> None:
    write_errand(paths, FULL)
    assert take_errand(paths) == FULL
    write_errand(paths, replace(FULL, **change))
    with pytest.raises(DataError):
        take_errand(paths)
    assert not paths.errand.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"command": "reboot"},
        {"hold": 1},
        {"serial": True},
        {"roster": {"revision": 1}},
        {"drain": ["n1"]},
        {"type": "Order"},
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(paths: Paths, change: dict) -> None:
    write_errand(paths, FULL)
    paths.errand.write_text(json.dumps(json.loads(paths.errand.read_text()) | change))
    with pytest.raises(DataError):
        take_errand(paths)
    assert not paths.errand.exists()


def test_links_and_large_files_are_refused(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    paths.errand.symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="no plain file"):
        take_errand(paths)
    paths.errand.write_bytes(b"x" * 20000)
    with pytest.raises(DataError, match="more than"):
        take_errand(paths)
    assert not paths.errand.exists()


def test_a_fault_of_ours_is_a_failed_errand(
    paths: Paths, api: FakeApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Kube) -> ClusterView:
        raise KeyError("confidential")

    monkeypatch.setattr(errands, "look", fails)
    write_errand(paths, LOOK)
    errands.run(paths)
    result = read_result(paths)
    assert result is not None
    assert result.outcome is Outcome.FAILED
    assert "a fault of k3sagentd's own: KeyError in k3s/errand.py:" in str(result.reason)
    assert "confidential" not in str(result.reason)
    assert "Traceback" in caplog.text


def test_a_view_of_many_nodes_comes_back_whole(paths: Paths) -> None:
    nodes = tuple(replace(servers(1, 0)[0], name=f"n{number:04}") for number in range(5000))
    result = ErrandResult(errand=LOOK, outcome=Outcome.DONE, view=ClusterView(nodes=nodes))
    write_result(paths, result)
    assert read_result(paths) == result


def test_the_daemon_hears_of_its_own_errand_only_and_once(paths: Paths) -> None:
    heard: list[ErrandResult] = []

    async def scene() -> None:
        came = asyncio.Event()

        async def ended(result: ErrandResult) -> None:
            heard.append(result)
            came.set()

        subject = Errands(paths, ended)
        running = asyncio.create_task(subject.run())
        write_result(paths, ErrandResult(errand=LOOK, outcome=Outcome.DONE))
        subject.give(HOLD)
        assert take_errand(paths) == HOLD
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(came.wait(), 0.6)
        write_result(paths, ErrandResult(errand=HOLD, outcome=Outcome.FAILED, reason="x"))
        await asyncio.wait_for(came.wait(), 10)
        came.clear()
        subject.give(replace(HOLD, serial=2))
        write_result(paths, ErrandResult(errand=replace(HOLD, serial=2), outcome=Outcome.DONE))
        await asyncio.wait_for(came.wait(), 10)
        running.cancel()

    asyncio.run(scene())
    assert [(each.errand.serial, each.outcome) for each in heard] == [
        (1, Outcome.FAILED),
        (2, Outcome.DONE),
    ]


def test_a_broken_result_is_no_answer(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async def ended(result: ErrandResult) -> None:
            pytest.fail("there is none")

        subject = Errands(paths, ended)
        subject.give(HOLD)
        paths.errand_result.write_text("{")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(subject.run(), 0.6)

    asyncio.run(scene())
    assert len(caplog.records) == 1
