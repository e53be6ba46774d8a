# SPDX-License-Identifier: Apache-2.0
"""A server's copy becomes the cluster after all have moved: when, and above all when not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.errors import TimedOutError, UnavailableError
from k3sagentd.k3s import underway
from k3sagentd.upkeep import repair, repair_steps
from tests.unit.fake_api import FakeApi
from tests.unit.machine import AT, ME, NEW, OLD, Server, row, status
from tests.unit.repairing import ALL_MOVED, MOVED2, MOVED3, READY2, Hears, carry_out, planned, told


def test_a_server_makes_its_copy_the_cluster_where_none_answers(
    server: Server, api: FakeApi
) -> None:
    for name in ("n1", "n2", "n3"):
        api.add_node(name, server=True)
    api.add_node("agent")
    flag = server.paths.k3s_data / "server/db/reset-flag"
    flag.touch()  # of an attempt that was cut off
    view = status(MOVED2, row(3, age_s=99))
    progress = planned(server, view)
    assert progress.server is None
    carry_out(server, progress, Hears(server.paths, view))
    assert set(api.nodes) == {"n1", "agent"}
    assert set(api.urls) == {"local"}
    assert server.said == [
        "disable --now k3s.service",
        "reset-failed k3s.service",
        "k3s server --cluster-reset",
        "daemon-reload",
        "enable k3s.service",
        "start --no-block k3s.service",
    ]
    assert told(server)["node-ip"] == NEW
    assert not {"server", "cluster-init"} & told(server).keys()
    assert (server.paths.k3s_data / "server/db/etcd/name").exists()


@pytest.mark.parametrize(
    ("others", "servers", "roster", "named"),
    [
        # Etcd knows them by other addresses: they are no quorum, in whatever number.
        ([MOVED2, MOVED3], 3, None, ""),
        ([MOVED2, MOVED3, row(4, moved=True), row(5, moved=True)], 5, None, ""),
        # One is off, perhaps for good: it is none alone, but one of two is enough.
        ([MOVED2, row(3, age_s=9)], 3, None, ""),
        ([MOVED2], 3, None, ""),
        ([row(2, age_s=9, moved=True), row(3, age_s=9, moved=True)], 3, None, "n2 n3"),
        ([row(2, age_s=9), row(3, age_s=9)], 3, None, "n2 n3"),
        ([], 3, None, "2 of which nothing is known"),
        ([], 1, None, ""),
        ([], 3, ["a" * 32], ""),
        ([row(2, role="agent"), row(3, role="agent")], 3, None, "2 of which"),
        ([MOVED2, row(3, age_s=9)], 5, None, "n3 2 of which"),
        ([MOVED2, MOVED3, row(4, age_s=9)], 5, None, ""),
        ([MOVED2, row(3, age_s=9)], 3, [f"{n}" * 32 for n in range(2, 6)], "n3 2 of which"),
        ([MOVED2, MOVED3], 3, ["a" * 32, *(f"{n}" * 32 for n in range(2, 6))], ""),
        ([row(2, age_s=9), MOVED3], 3, ["a" * 32, "2" * 32], ""),
        # K3s of these may only be starting: with the addresses that etcd knows they are a quorum,
        # and the one that was reset is one all by itself.
        ([row(2), row(3)], 3, None, "n2 n3"),
        ([row(2), row(3, age_s=9)], 3, None, "n2 n3"),
        ([MOVED2, row(3)], 3, None, "n3"),
        ([row(2)], 3, None, "n2 1 of which"),
        ([MOVED2, MOVED3, row(4), row(5, age_s=9)], 5, None, "n4 n5"),
        ([row(2, phase="waiting"), MOVED3], 3, None, "n2"),
        # No server by the roster any more, but with the data of one.
        ([MOVED2, MOVED3, row(4, role="agent", member=True)], 3, None, "n4"),
        ([MOVED2, MOVED3, row(4, role="agent")], 3, None, ""),
    ],
)
def test_a_copy_becomes_the_cluster_only_where_no_other_can_be_it(
    server: Server, others: list[dict], servers: int, roster: list[str] | None, named: str
) -> None:
    view = status(*others, servers=servers, roster=roster)
    if not named:
        assert planned(server, view).server is None
        return
    with pytest.raises(UnavailableError, match="cluster may be alive without this one") as caught:
        planned(server, view)
    said = str(caught.value)
    assert re.findall(r"n\d|\d of which", said) == re.findall(r"n\d|\d of which", named)
    heard = [each for each in others if each["age_s"] == 0 and f"{each['name']} (" in said]
    assert ("Perhaps only starting" in said) is bool(heard)
    assert ("Wait until one is ready" in said) is bool(heard)
    unheard = len(re.findall(r"n\d|\d of which", named)) > len(heard)
    assert ("Power them on" in said) is unheard
    assert ("«etcd lost its quorum» in /usr/share/doc/k3sagentd/operations.md" in said) is unheard


def test_a_server_of_an_earlier_version_says_nothing_of_its_address(server: Server) -> None:
    old = row(2)
    del old["moved"], old["member"]
    with pytest.raises(UnavailableError, match="Perhaps only starting: n2"):
        planned(server, status(old, MOVED3))


def test_who_is_silent_is_asked_about(server: Server) -> None:
    config = load_config(server.paths)
    found = repair.plan(server.paths, config, AT, status(MOVED2, row(3, age_s=9)))
    assert found is not None
    assert "Not heard: n3 (127.0.0.3)." in found.question
    found = repair.plan(server.paths, config, AT, ALL_MOVED)
    assert found is not None
    assert "Not heard" not in found.question


# What others may say while the operator thinks, and while the command runs.
NEWS = [
    (status(READY2, MOVED3), "127.0.0.2:6443 is ready now; run this again"),
    (status(row(2), MOVED3), "Perhaps only starting: n2"),
    (status(row(2, age_s=9), row(3, age_s=9)), "Not heard: n2"),
    (status() | {"node": {"id": ME, "address": OLD}}, f"this machine's address is {OLD} now"),
    (ALL_MOVED | {"site": {"phase": "conflict", "servers": 3}}, "the site is conflict"),
]


@pytest.mark.parametrize(("view", "said"), NEWS)
def test_what_was_so_before_the_question_is_looked_at_after_it(
    server: Server, view: dict, said: str
) -> None:
    progress = planned(server, ALL_MOVED)
    before = server.files()
    with pytest.raises(UnavailableError, match=said):
        carry_out(server, progress, Hears(server.paths, view))
    assert server.files() == before
    assert server.said == []


@pytest.mark.parametrize(("view", "said"), NEWS)
def test_and_directly_before_the_copy_becomes_the_cluster(
    server: Server, view: dict, said: str
) -> None:
    progress = planned(server, ALL_MOVED)
    daemon = Hears(server.paths, ALL_MOVED, view)
    with pytest.raises(UnavailableError, match=said):
        carry_out(server, progress, daemon)
    assert "k3s server --cluster-reset" not in server.said
    # While it looked it was no bystander for the others; now etcd knows it by its old address.
    assert daemon.known == [None, OLD]
    assert underway.load(server.paths) == replace(progress, step=repair.WRITE)
    assert planned(server, ALL_MOVED) == replace(progress, step=repair.WRITE)


def test_of_two_at_once_one_at_most_goes_on(
    server: Server, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the one waits for the others' word, the other begins, hears of it, and gives up."""
    api.add_node("n1", server=True)
    one, two = Hears(server.paths), Hears(Server(tmp_path / "other", method="exec").paths)

    def hears(of: Hears) -> dict:
        return status(row(2, moved=not of.known or of.known[-1] == OLD), MOVED3)

    monkeypatch.setattr(one, "status", lambda: hears(two))
    monkeypatch.setattr(two, "status", lambda: hears(one))
    said: list[str] = []
    tell = one.reread

    def reread() -> None:
        tell()
        if len(one.known) > 1:
            return  # it is done
        config = load_config(two.paths)
        found = repair.plan(two.paths, config, AT, ALL_MOVED)  # what it heard before
        assert found is not None
        with pytest.raises(UnavailableError, match="Perhaps only starting: n2"):
            repair.carry_out(two.paths, config, found.progress, two, said.append)

    monkeypatch.setattr(one, "reread", reread)
    assert repair.RESET in carry_out(server, planned(server, ALL_MOVED), one)
    assert said == []


def test_the_others_hear_what_is_under_way(server: Server, api: FakeApi) -> None:
    api.add_node("n1", server=True, ready=False)
    api.add_node("n2", server=True)
    daemon = Hears(server.paths)
    carry_out(server, planned(server, ALL_MOVED), daemon)
    assert daemon.known == [None, NEW]
    server.tell()
    api.add_node("n1", server=True, ready=False)
    api.add_node("n2", server=True)
    daemon = Hears(server.paths)
    carry_out(server, planned(server, status(READY2)), daemon)
    assert daemon.known == [None, NEW]


def test_who_began_alone_joins_a_server_that_came_meanwhile(server: Server, api: FakeApi) -> None:
    api.add_node("n2", server=True)
    begun = planned(server, ALL_MOVED)
    # A copy that was reset and never started is nobody's cluster yet.
    for step in ("", repair.STOP, repair.WRITE, repair.RESET):
        underway.save(server.paths, replace(begun, step=step, sure=step != repair.RESET))
        again = planned(server, status(READY2))
        assert (again.server, again.step) == ("https://127.0.0.2:6443", "")
    underway.save(server.paths, replace(begun, step=repair.START, sure=False))
    assert planned(server, status(READY2)).step == repair.START, "it runs, and may be the cluster"
    (server.paths.root / "active").unlink()
    assert planned(server, status(READY2)).server is not None, "it was to be started, and was not"


def test_what_was_reset_and_not_started_is_looked_at_and_reset_again(
    server: Server, api: FakeApi
) -> None:
    api.add_node("n1", server=True)
    begun = planned(server, ALL_MOVED)
    (server.paths.root / "active").unlink()
    for step in (repair.RESET, repair.START):
        underway.save(server.paths, replace(begun, step=step, sure=False))
        with pytest.raises(UnavailableError, match="Perhaps only starting: n2"):
            planned(server, status(row(2), MOVED3))
    assert carry_out(server, planned(server, ALL_MOVED)) == [
        repair.RESET,
        repair.START,
        repair.FORGET,
    ]


def test_what_was_begun_for_an_address_that_is_none_any_more_begins_anew(
    server: Server, api: FakeApi
) -> None:
    api.add_node("n1", server=True)
    begun = replace(planned(server, ALL_MOVED), address="10.0.0.8")
    for step in (repair.WRITE, repair.START):
        underway.save(server.paths, replace(begun, step=step, sure=False))
        again = planned(server, ALL_MOVED)
        assert (again.step, again.address, again.was) == ("", NEW, OLD)
    carry_out(server, again)
    assert told(server)["node-ip"] == NEW


def test_an_address_that_was_given_back_undoes_what_was_begun(server: Server) -> None:
    config = load_config(server.paths)
    begun = planned(server, ALL_MOVED)
    with pytest.raises(UnavailableError):
        carry_out(server, begun, Hears(server.paths, ALL_MOVED, status(row(2), MOVED3)))
    assert told(server)["node-ip"] == NEW
    found = repair.plan(server.paths, config, replace(AT, address=OLD), status(row(2), MOVED3))
    assert found is not None
    assert f"has the address again that etcd knows it by, {OLD}" in found.question
    assert found.after is None
    daemon = Hears(server.paths, status(row(2), MOVED3))
    assert carry_out(server, found.progress, daemon) == [repair.STOP, repair.WRITE, repair.START]
    assert told(server)["node-ip"] == OLD
    assert (server.paths.root / "active").exists()
    assert "k3s server --cluster-reset" not in server.said
    assert daemon.known == [OLD]
    # Where its copy may have been reset it is none of those that it was.
    underway.save(server.paths, replace(begun, step=repair.RESET, sure=False))
    with pytest.raises(UnavailableError, match="Perhaps only starting"):
        repair.plan(server.paths, config, replace(AT, address=OLD), status(row(2), MOVED3))


def test_a_late_look_spares_who_joined_meanwhile(server: Server, api: FakeApi) -> None:
    looks = iter(["True", "Unknown"])

    def look(method: str, path: str) -> None:
        if path == "/api/v1/nodes":
            api.nodes["n3"]["status"]["conditions"][1]["status"] = next(looks)

    api.before = look
    api.add_node("n1", server=True)
    api.add_node("n2", server=True)
    api.add_node("n3", server=True)  # not heard for long, but K3s was not up to notice that
    begun = replace(planned(server, ALL_MOVED), step=repair.START, sure=False)
    assert carry_out(server, begun) == [repair.START, repair.FORGET]
    assert set(api.nodes) == {"n1", "n2"}


def test_a_k3s_that_does_not_come_is_waited_for_in_bounds(
    server: Server, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair_steps, "API_TIMEOUT_S", 0.1)
    progress = planned(server, ALL_MOVED)
    api.close()
    with pytest.raises(TimedOutError, match="run it again"):
        carry_out(server, progress)
    left = underway.load(server.paths)
    assert left is not None
    assert left.step == repair.START


def test_the_old_address_is_named(server: Server) -> None:
    found = repair.plan(server.paths, load_config(server.paths), AT, ALL_MOVED)
    assert found is not None
    assert f"was {OLD} and is {NEW} now" in found.question
    assert "what only others\nhad committed is lost" in found.question
