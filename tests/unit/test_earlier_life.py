# SPDX-License-Identifier: Apache-2.0
"""A new identity over data that an earlier one's order made: epochs begin at 0 in every log, so
only the node in the marker tells whose it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Datastore
from k3sagentd.errors import DataError
from k3sagentd.k3s import dropin, facts
from k3sagentd.k3s.data import MARKER, Marker, datastore, read_marker, write_marker
from k3sagentd.k3s.order import check
from tests.unit.rooted import AS_AGENT, AS_SERVER, INIT, NODE, ONE, SERVER, WAL, Machine

STAND_DOWN = replace(INIT, action=Action.STAND_DOWN)
EARLIER = "fedcba9876543210"
MARKERS = [
    Marker(epoch=0, node=EARLIER),
    Marker(epoch=1, node=EARLIER),
    Marker(epoch=0, generation=1, node=EARLIER),
    Marker(epoch=0),
]


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def runs(m: Machine, marker: Marker) -> None:
    """A live server, after ``apt purge`` and a new install."""
    m.put(*AS_SERVER, WAL)
    write_marker(m.paths.k3s_data, marker)
    m.k3s.role = SERVER


@pytest.mark.parametrize("marker", MARKERS, ids=repr)
def test_it_is_adopted_and_never_stood_down(m: Machine, marker: Marker) -> None:
    runs(m, marker)
    m.does(INIT)
    before = m.files()
    m.does(STAND_DOWN)
    assert m.files() == before
    assert m.k3s.role is SERVER


@pytest.mark.parametrize("marker", MARKERS, ids=repr)
def test_a_card_in_another_machine_is_taken_over_with_its_data(m: Machine, marker: Marker) -> None:
    """What runs K3s there is ours, by an install of the earlier identity."""
    runs(m, marker)
    m.ours(SERVER)
    m.does(INIT)
    m.does(STAND_DOWN)
    assert datastore(m.paths.k3s_data) is Datastore.ETCD
    assert read_marker(m.paths.k3s_data) == marker, "it stays what it was before"


def test_what_an_abandoned_start_left_is_told_by_node(m: Machine) -> None:
    runs(m, Marker(epoch=0, node=NODE))
    m.ours(SERVER)
    m.paths.dropin.write_bytes(dropin.render({"cluster-init": True}))
    assert facts.collect(m.paths, load_config(m.paths)).origin_node == NODE
    m.does(STAND_DOWN, "stop")
    assert datastore(m.paths.k3s_data) is Datastore.NONE


def test_a_marker_without_data_is_written_anew(m: Machine) -> None:
    write_marker(m.paths.k3s_data, Marker(epoch=3, node=EARLIER))
    m.does(INIT, "install server", "start server")
    assert read_marker(m.paths.k3s_data) == Marker(epoch=0, node=NODE)


def test_a_server_that_was_told_of_others_is_not_stood_down(m: Machine) -> None:
    runs(m, Marker(epoch=0, node=NODE))
    m.ours(SERVER)
    m.refuses(STAND_DOWN, f"in the cluster of {ONE}")


def test_k3s_that_our_install_did_not_begin_is_not_stood_down(m: Machine) -> None:
    runs(m, Marker(epoch=0, node=NODE))
    m.refuses(STAND_DOWN, "was not installed by k3sagentd")


@pytest.mark.parametrize("order", [INIT, STAND_DOWN])
def test_who_starts_or_abandons_a_cluster_says_who_it_is(order) -> None:
    with pytest.raises(DataError, match="needs node"):
        check(replace(order, node=""))


@pytest.mark.parametrize("node", [None, 7, ["x"], ""])
def test_a_marker_that_names_nobody_is_nobodys(m: Machine, node: object) -> None:
    m.paths.k3s_data.mkdir(parents=True, exist_ok=True)
    (m.paths.k3s_data / MARKER).write_text(json.dumps({"epoch": 0, "node": node}))
    found = read_marker(m.paths.k3s_data)
    assert found is not None
    assert not found.is_by("")
    assert facts.collect(m.paths, load_config(m.paths)).origin_node is None


@pytest.mark.parametrize("kind", [[*AS_SERVER, WAL], AS_AGENT])
def test_the_name_that_k3s_was_told_outlives_what_we_know(m: Machine, kind: list[str]) -> None:
    m.ours(SERVER, **{"node-name": "raspberrypi-0123abcd"})
    config = load_config(m.paths)
    assert facts.collect(m.paths, config).told_name is None, "nobody knows it by that name yet"
    m.put(*kind)
    assert facts.collect(m.paths, config).told_name == "raspberrypi-0123abcd"


@pytest.mark.parametrize("text", ["node-name: 7\n", "{", "server: x\n"])
def test_a_drop_in_that_names_nobody_is_no_name(m: Machine, text: str) -> None:
    m.put(*AS_SERVER, WAL)
    m.ours(SERVER)
    m.paths.dropin.write_text(text)
    assert facts.collect(m.paths, load_config(m.paths)).told_name is None
