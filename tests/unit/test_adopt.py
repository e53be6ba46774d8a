# SPDX-License-Identifier: Apache-2.0
"""K3s was here before us: looked at, compared, started at most; SQLite converted once."""

from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Datastore, Order, Outcome
from k3sagentd.k3s import adopt, convert, dropin, facts, ownership
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.work import Work
from tests.unit.rooted import (
    AGENT,
    AS_AGENT,
    AS_SERVER,
    CA,
    HASH,
    INIT,
    JOIN,
    JOIN_AGENT,
    ONE,
    SERVER,
    STATE,
    TOKEN,
    TWO,
    WAL,
    Machine,
)


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# --- adopted --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [INIT, JOIN])
@pytest.mark.parametrize("running", [True, False])
def test_an_adopted_server_is_started_at_most(m: Machine, order: Order, running: bool) -> None:
    m.put(*AS_SERVER, WAL)
    (m.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:{TOKEN}\n")
    m.k3s.role = SERVER if running else None
    before = m.files()
    m.does(order, *([] if running else ["start server as it is"]))
    assert m.files() == before
    m.does(order)


@pytest.mark.parametrize("order", [INIT, JOIN])
def test_an_adopted_server_of_another_token_is_refused(m: Machine, order: Order) -> None:
    m.put(*AS_SERVER, WAL)
    (m.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:other\n")
    m.refuses(order, f"into {m.paths.token} on all machines")


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (f"K10{HASH}::server:other", "is not the site's token"),
        (f"K10{'0' * 64}::node:agents", "is of the cluster with CA 000000000000"),
        (f"K10{HASH}::server:{TOKEN}", None),
        (f"K10{HASH}::node:agents", None),
        ("agents", None),
    ],
)
def test_an_adopted_agents_token_is_compared_as_far_as_it_can_be(
    m: Machine, token: str, why: str | None
) -> None:
    m.put(*AS_AGENT)
    m.paths.k3s_config.write_text(f"server: {ONE}\ntoken: {token}\n")
    m.k3s.role = AGENT
    if why:
        m.refuses(JOIN_AGENT, why)
    else:
        m.does(JOIN_AGENT)
    assert not m.paths.dropin.exists()


def test_an_adopted_member_keeps_its_role(m: Machine) -> None:
    m.put(*AS_AGENT)
    m.k3s.role = AGENT
    for action in (Action.PREPARE, Action.JOIN):
        m.refuses(replace(JOIN, action=action), "K3s was an agent here before k3sagentd")
    m.put(*AS_SERVER[:1], WAL)
    m.refuses(JOIN_AGENT, "run k3s-uninstall.sh and delete its Node")


def test_what_is_adopted_is_told_by_unit_and_stamp(m: Machine) -> None:
    m.configure("")
    m.paths.config.write_text("nodes: 3\n")
    config = load_config(m.paths)
    assert not ownership.is_adopted(m.paths, config)
    m.put(*AS_SERVER, WAL)
    assert not ownership.is_adopted(m.paths, config), "nothing runs it: an old disk"
    unit = m.paths.root / "etc/systemd/system/k3s-mine.service"
    unit.parent.mkdir(parents=True)
    unit.with_name("k3sagentd.service").touch()
    assert not ownership.is_adopted(m.paths, config)
    unit.touch()
    assert ownership.is_adopted(m.paths, config)
    m.ours(SERVER)
    assert not ownership.is_adopted(m.paths, config)


# --- SQLite ---------------------------------------------------------------------------------


def sqlite(m: Machine) -> None:
    m.put(*AS_SERVER, STATE)
    (m.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:{TOKEN}\n")
    m.k3s.role = SERVER


def test_a_running_sqlite_server_is_restarted_once_with_one_word(m: Machine) -> None:
    sqlite(m)
    m.does(INIT, "halt", "start server as it is")
    assert m.said() == {"cluster-init": True}
    assert datastore(m.paths.k3s_data) is Datastore.ETCD
    assert not m.paths.installed.exists()
    m.does(INIT)
    # Others are there: it would follow them if it lost its data.
    m.does(JOIN)
    assert m.said() == {"server": ONE, "token-file": str(m.paths.k3s_token)}
    assert m.paths.k3s_token.read_text() == f"K10{HASH}::server:{TOKEN}\n"
    del m.there[ONE]
    m.does(JOIN)
    assert m.said()["server"] == TWO


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("k3s version v1.21.2+k3s1 (5a67e8dc)", "K3s is v1.21.2 here; releases before v1.22.2"),
        ("k3s version v1.22.1+k3s1 (5a67e8dc)", "K3s is v1.22.1 here"),
        ("k3s version dev", "cannot be told (k3s version dev)"),
        (None, "cannot be told (k3s --version says nothing)"),
    ],
)
def test_an_old_or_unknown_release_is_not_asked_to_convert(
    m: Machine, says: str | None, why: str
) -> None:
    sqlite(m)
    m.k3s.says = says
    m.refuses(INIT, why)


@pytest.mark.parametrize("line", [f"server: {ONE}", "datastore-endpoint: mysql://x"])
def test_a_setting_that_leads_away_from_the_data_is_refused(m: Machine, line: str) -> None:
    sqlite(m)
    m.paths.k3s_config.write_text(line + "\n")
    m.refuses(INIT, f"{line.split(':')[0]} is set for K3s on this machine")


def test_a_later_file_that_forbids_it_is_found_before_the_restart(m: Machine) -> None:
    sqlite(m)
    (m.paths.dropin.parent / "99.yaml").write_text("cluster-init: false\n")
    m.refuses(INIT, "cluster-init is False for K3s on this machine")


def test_a_token_that_stands_where_its_file_should_is_not_shown(m: Machine) -> None:
    sqlite(m)
    m.does(INIT, "halt", "start server as it is")
    (m.paths.dropin.parent / "99.yaml").write_text(f"token-file: {TOKEN}\n")
    result = m.apply(JOIN)
    assert "token-file is set for K3s on this machine" in str(result.reason)
    assert TOKEN not in str(result.reason)


def test_a_conversion_that_was_cut_short_begins_again_from_the_whole(m: Machine) -> None:
    sqlite(m)
    m.k3s.converts = False
    result = m.apply(INIT)
    assert "was started 3 times with cluster-init" in str(result.reason)
    # The power went while K3s was copying, and it came back with the part that it had copied.
    m.put(WAL)
    m.k3s.converts = True
    m.does(INIT, "halt", "start server as it is")
    assert (m.paths.k3s_data / "server/db/etcd.incomplete/member/wal").is_dir()
    assert (m.paths.k3s_data / "server/db/state.db.migrated").read_bytes() == CA
    m.does(INIT)


def test_an_etcd_beside_a_stale_sqlite_file_is_no_conversion_of_ours(m: Machine) -> None:
    sqlite(m)
    m.put(WAL)
    m.does(INIT)
    assert not m.paths.dropin.exists()


def test_k3s_that_nobody_could_restart_is_not_stopped(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite(m)
    m.k3s.role = None
    monkeypatch.setattr(convert, "answers", lambda: True)
    m.refuses(INIT, "K3s runs here, but not as a service")


# --- removed from etcd ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [INIT, replace(INIT, ca_hash=HASH), JOIN, JOIN_AGENT])
@pytest.mark.parametrize("converted", [True, False])
def test_an_adopted_server_that_etcd_removed_is_never_started(
    m: Machine, order: Order, converted: bool
) -> None:
    """It would found a second cluster under the same CA, by its operator's ``cluster-init``."""
    m.put(*AS_SERVER, WAL, "server/db/etcd/tombstone")
    (m.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:{TOKEN}\n")
    if converted:
        m.paths.dropin.write_bytes(dropin.render({"cluster-init": True}))
    m.refuses(order, "etcd removed this server from its cluster")
    found = facts.read_facts(m.paths)
    assert found is not None
    assert found.facts.removed, "nobody may count on it any more"


def test_an_adopted_server_that_learns_of_its_removal_meanwhile_is_not_started(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    m.put(*AS_SERVER, WAL)

    def learns(work: Work) -> None:
        m.put("server/db/etcd/tombstone")

    monkeypatch.setattr(adopt, "check_token", learns)
    assert m.apply(JOIN).outcome is Outcome.FAILED_FOR_GOOD
    assert not m.k3s.did


def test_a_server_of_ours_that_etcd_removed_says_nothing_of_the_kind(m: Machine) -> None:
    """It is joined anew by an order like any other."""
    m.put(*AS_SERVER, WAL, "server/db/etcd/tombstone")
    m.ours(SERVER)
    assert not facts.collect(m.paths, load_config(m.paths)).removed
