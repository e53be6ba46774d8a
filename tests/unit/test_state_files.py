# SPDX-License-Identifier: Apache-2.0
"""Identity and votes on the disk: bound to the hardware, never silently forgotten."""

import os
from pathlib import Path

import pytest

from k3sagentd import store
from k3sagentd.core.log import Nominate
from k3sagentd.core.paxos import Acceptor, Ballot, Proposal
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId
from k3sagentd.hardware import Hardware, same_machine
from k3sagentd.identity import load_or_create
from k3sagentd.keys import derive

KEYS = derive(b"k" * 32)
ME = NodeId("a" * 32)
PI = Hardware(serial="100000001234abcd", macs=("dc:a6:32:00:00:01",))
OTHER_PI = Hardware(serial="10000000ffffffff", macs=("dc:a6:32:00:00:02",))


def full() -> Durable:
    nominate = Nominate(init=ME, servers=(ME,))
    ballot = Ballot(round=3, node=ME)
    accepted = Proposal(ballot=ballot, value=nominate)
    return Durable(
        node=ME,
        nodes=5,
        log=(nominate,),
        acceptor=Acceptor(promised=ballot, accepted=accepted),
        started_epoch=0,
        node_name="n",
    )


def test_votes_survive(tmp_path: Path) -> None:
    store.save(tmp_path, full())
    assert store.load(tmp_path, ME) == full()


def test_any_flipped_byte_mutes_the_node_and_keeps_the_file(tmp_path: Path) -> None:
    store.save(tmp_path, full())
    good = (tmp_path / store.FILE_NAME).read_bytes()
    for i in range(0, len(good), 7):
        for each in tmp_path.iterdir():
            each.unlink()
        bad = good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]
        (tmp_path / store.FILE_NAME).write_bytes(bad)
        loaded = store.load(tmp_path, ME)
        if loaded == full():  # white space, which carries no vote
            continue
        assert loaded.muted, f"byte {i}"
        assert loaded.acceptor.blank
        kept = tmp_path / f"{store.FILE_NAME}.damaged-1"
        assert kept.read_bytes() == bad
        assert store.load(tmp_path, ME).muted == loaded.muted


def test_every_truncation_mutes_the_node(tmp_path: Path) -> None:
    store.save(tmp_path, full())
    good = (tmp_path / store.FILE_NAME).read_bytes()
    for length in range(0, len(good) - 1, 11):
        (tmp_path / store.FILE_NAME).write_bytes(good[:length])
        assert store.load(tmp_path, ME).muted


def test_a_lost_file_mutes_an_identity(tmp_path: Path) -> None:
    assert "is missing" in str(store.load(tmp_path, ME).muted)


def test_votes_of_another_node_are_not_taken(tmp_path: Path) -> None:
    store.save(tmp_path, full())
    assert store.load(tmp_path, NodeId("b" * 32)).muted


def test_an_identity_is_kept_on_its_hardware(tmp_path: Path) -> None:
    first = load_or_create(tmp_path, KEYS, PI)
    assert store.load(tmp_path, first.node).muted is None
    again = load_or_create(tmp_path, KEYS, PI)
    assert (again.node, again.moved) == (first.node, None)


class PowerCutError(BaseException):
    """Ends the process where it stands."""


@pytest.mark.parametrize("call", range(9))
def test_a_power_cut_in_the_first_start_costs_no_vote(tmp_path: Path, monkeypatch, call) -> None:
    left = [call]

    def cut(real):
        def wrapped(*arguments):
            if left[0] == 0:
                raise PowerCutError
            left[0] -= 1
            return real(*arguments)

        return wrapped

    # Three files (binding, votes, key), each with two fsyncs and a rename.
    monkeypatch.setattr("os.fsync", cut(os.fsync))
    monkeypatch.setattr(Path, "rename", cut(Path.rename))
    with pytest.raises(PowerCutError):
        load_or_create(tmp_path, KEYS, PI)
    monkeypatch.undo()
    identity = load_or_create(tmp_path, KEYS, PI)
    assert store.load(tmp_path, identity.node) == Durable(node=identity.node)


def test_a_copied_card_makes_a_new_identity_and_takes_no_votes_along(tmp_path: Path) -> None:
    first = load_or_create(tmp_path, KEYS, PI)
    moved = load_or_create(tmp_path, KEYS, OTHER_PI)
    assert moved.node != first.node
    assert "moved here from another machine" in str(moved.moved)
    assert store.load(tmp_path, moved.node) == Durable(node=moved.node)
    assert (tmp_path / "moved-1" / store.FILE_NAME).exists()


@pytest.mark.parametrize("damage", ["node.key", "node.json"])
def test_a_damaged_identity_is_put_aside(tmp_path: Path, damage: str) -> None:
    first = load_or_create(tmp_path, KEYS, PI)
    (tmp_path / damage).write_bytes(b"{}")
    second = load_or_create(tmp_path, KEYS, PI)
    assert second.node != first.node
    assert "damaged" in str(second.moved)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (PI, Hardware(serial=PI.serial, macs=("00:e0:4c:00:00:09",)), True),
        (PI, OTHER_PI, False),
        (Hardware(uuid="u1", macs=("a",)), Hardware(uuid="u2", macs=("a",)), False),
        (Hardware(uuid="u1", macs=("a", "b")), Hardware(uuid="u1", macs=("b",)), True),
        (Hardware(uuid="u1", macs=("a",)), Hardware(uuid="u1", macs=("b",)), False),
        (Hardware(), Hardware(), True),
    ],
)
def test_what_counts_as_the_same_machine(before: Hardware, now: Hardware, same: bool) -> None:
    assert same_machine(before, now) is same
