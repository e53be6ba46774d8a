# SPDX-License-Identifier: Apache-2.0
"""Root in the Kubernetes API: what it does there, what it refuses, what it does not believe."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.cluster import ClusterView, Errand, ErrandResult, KubeNode, Roster
from k3sagentd.core.k3s import Outcome, release_key
from k3sagentd.core.words import NodeId
from k3sagentd.daemon.errands import Errands
from k3sagentd.errors import DataError, MachineError
from k3sagentd.k3s import errand as errands
from k3sagentd.k3s import kube
from k3sagentd.k3s.errand import carry_out, read_result, take_errand, write_errand, write_result
from k3sagentd.k3s.facts import read_facts
from k3sagentd.k3s.kube import ConflictError, Kube
from k3sagentd.k3s.quorum import removal_trouble
from k3sagentd.paths import Paths
from tests.unit.fake_api import LEASES, FakeApi

ME, YOU = NodeId("a" * 32), NodeId("b" * 32)
UID = "01234567-89ab-cdef-0123-456789abcdef"
LOOK = Errand(serial=1, instance="c" * 16, node=ME)
HOLD = replace(LOOK, hold=True)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    for each in (found.run, found.root_run, found.config.parent, tmp_path / "bin"):
        each.mkdir(parents=True)
    found.config.write_text(f"nodes: 3\ninstall: {{binary: {tmp_path}/bin/k3s}}\n")
    return found


@pytest.fixture
def api(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    made = FakeApi(tmp_path / "api")
    made.give_certificates(paths.k3s_data / "server/tls")
    monkeypatch.setattr(errands, "Kube", lambda paths: Kube(paths, made.url))
    yield made
    made.close()


def k3s(paths: Paths, text: str) -> None:
    """A K3s binary that has only kubectl."""
    binary = paths.root / "bin/k3s"
    binary.write_text(f"#!/bin/sh\n{text}\n")
    binary.chmod(0o755)


def three_servers(api: FakeApi) -> dict[str, str]:
    return {name: api.add_node(name, server=True) for name in ("n1", "n2", "n3")}


def lease(api: FakeApi) -> dict:
    return api.leases["k3sagentd"]


def view_of(paths: Paths, errand: Errand = LOOK) -> ClusterView:
    result = carry_out(paths, errand)
    assert result.outcome is Outcome.DONE, result.reason
    assert result.view is not None
    return result.view


# --- the client -----------------------------------------------------------------------------


def test_a_look_shows_nodes_and_no_lease(paths: Paths, api: FakeApi) -> None:
    api.add_node("n2", k3sagentd_node_id=YOU, k3sagentd_hardware="d" * 16)
    api.add_node("n1", server=True, ready=False, k3sagentd_node_id="not an id")
    view = view_of(paths)
    assert [(n.name, n.node, n.hardware, n.server, n.ready) for n in view.nodes] == [
        ("n1", None, None, True, False),
        ("n2", YOU, "d" * 16, False, True),
    ]
    assert view.nodes[0].uid == api.nodes["n1"]["metadata"]["uid"]
    assert (view.lease_version, view.holder, view.roster) == (None, None, None)
    assert not api.leases
    assert not any(not each.startswith("GET ") for each in api.requests)


def test_the_release_is_that_of_the_oldest_server(paths: Paths, api: FakeApi) -> None:
    """Who joins must not be newer than a server; numbers are not compared as texts."""
    api.add_node("n1", server=True, release="v1.33.10+k3s1")
    api.add_node("n2", server=True, release="v1.33.9+k3s2", ready=False)
    api.add_node("n3", server=True, release="v1.33.9+k3s10")
    api.add_node("n4", server=True, release="v1.28.0; reboot")
    api.add_node("n5", release="v1.30.1+k3s1")
    view = view_of(paths)
    assert [n.release for n in view.nodes][3:] == [None, "v1.30.1+k3s1"]
    assert view.release == "v1.33.9+k3s2"
    assert replace(view, nodes=view.nodes[3:]).release is None
    assert release_key("v1.33.9-rc1+k3s1") < release_key("v1.33.9+k3s1")


def test_many_nodes_come_in_pages(paths: Paths, api: FakeApi) -> None:
    names = [f"n{number:03}" for number in range(25)]
    for name in names:
        api.add_node(name)
    api.page_limit = 10
    assert [node.name for node in view_of(paths).nodes] == names
    assert api.requests.count("GET /api/v1/nodes") == 3


def test_only_the_clusters_own_ca_is_believed(paths: Paths, api: FakeApi, tmp_path: Path) -> None:
    other = FakeApi(tmp_path / "other")
    try:
        with pytest.raises(MachineError, match=r"GET https://.* got no answer: .*CERTIFICATE"):
            Kube(paths, other.url).nodes()
    finally:
        other.close()
    assert not other.requests


def test_without_certificates_or_server_it_says_so(paths: Paths) -> None:
    with pytest.raises(MachineError, match="only a server that was ready once has them"):
        Kube(paths)
    result = carry_out(paths, LOOK)
    assert (result.outcome, result.view) == (Outcome.FAILED, None)


def test_nobody_listens(paths: Paths, api: FakeApi) -> None:
    api.close()
    result = carry_out(paths, LOOK)
    assert (result.outcome, result.view) == (Outcome.FAILED, None)
    assert "got no answer: Connection refused" in str(result.reason)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"["), "was answered 200: ["),
        ((200, []), "was answered 200: []"),
        ((403, {"message": "forbidden"}), "was answered 403: forbidden"),
        ((200, {"items": {}, "metadata": {"continue": "x"}}), "more than"),
        ((200, {"items": "x"}), "without a list"),
        ((200, {"items": [{"metadata": {"name": 1}}]}), "name 1, not a text"),
        ((200, {"items": [{"metadata": {"name": "x" * 300}}]}), "not a text"),
        ((200, {"items": ["x"]}), "name None, not a text"),
        ((200, b" " * 3000), "more than 2000 bytes"),
    ],
)
def test_answers_that_no_api_gives(
    paths: Paths, api: FakeApi, monkeypatch: pytest.MonkeyPatch, answer: tuple, said: str
) -> None:
    monkeypatch.setattr(kube, "ANSWER_LIMIT_BYTES", 2000)
    monkeypatch.setattr(api, "answer", lambda *_: answer)
    with pytest.raises(MachineError) as caught:
        Kube(paths, api.url).nodes()
    assert said in str(caught.value)


# --- the Lease ------------------------------------------------------------------------------


def test_the_lease_is_made_kept_and_released(paths: Paths, api: FakeApi) -> None:
    roster = Roster(revision=3, servers=(ME, YOU), init=ME)
    first = view_of(paths, replace(HOLD, roster=roster))
    assert (first.holder, first.roster) == (ME, roster)
    spec = lease(api)["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == (ME, 0)
    lease(api)["metadata"]["annotations"]["theirs"] = "stays"
    second = view_of(paths, replace(HOLD, lease_version=first.lease_version))
    assert second.lease_version != first.lease_version
    assert second.roster == roster
    assert lease(api)["metadata"]["annotations"]["theirs"] == "stays"
    taken = view_of(paths, replace(HOLD, node=YOU, lease_version=second.lease_version))
    assert taken.holder == YOU
    assert lease(api)["spec"]["leaseTransitions"] == 1
    released = replace(HOLD, node=YOU, lease_version=taken.lease_version, release=True)
    assert view_of(paths, released).holder is None
    assert "holderIdentity" not in lease(api)["spec"]


@pytest.mark.parametrize("version", [None, "1"])
def test_a_lease_that_changed_is_not_written(
    paths: Paths, api: FakeApi, version: str | None
) -> None:
    view_of(paths, replace(HOLD, node=YOU))
    before = json.dumps(lease(api))
    uid = api.add_node("n9", ready=False)
    result = carry_out(paths, replace(HOLD, lease_version=version, remove="n9", uid=uid))
    assert result.outcome is Outcome.FAILED
    assert f"held by {YOU}; expected {version or 'none'}" in str(result.reason)
    assert result.view is not None
    assert result.view.holder == YOU
    assert json.dumps(lease(api)) == before
    assert "n9" in api.nodes


@pytest.mark.parametrize("there", [False, True])
def test_who_writes_between_look_and_write_wins(paths: Paths, api: FakeApi, there: bool) -> None:
    version = view_of(paths, replace(HOLD, node=YOU)).lease_version if there else None

    def meanwhile(method: str, path: str) -> None:
        if method in ("POST", "PUT"):
            api.before = lambda *_: None
            client = Kube(paths, api.url)
            client.write_lease(client.lease(), YOU, None)

    api.before = meanwhile
    result = carry_out(paths, replace(HOLD, lease_version=version))
    assert result.outcome is Outcome.FAILED
    assert "was answered 409" in str(result.reason)
    assert result.view is not None
    assert result.view.holder == YOU


def test_a_lease_that_is_gone_is_a_conflict(paths: Paths, api: FakeApi) -> None:
    client = Kube(paths, api.url)
    found = client.write_lease(None, ME, None)
    api.leases.clear()
    with pytest.raises(ConflictError):
        client.write_lease(found, ME, None)


@pytest.mark.parametrize(
    "annotation",
    [
        "{",
        '{"revision": 1}',
        '{"revision": "1", "servers": []}',
        '{"revision": 1, "servers": []}',
        '{"revision": 1, "servers": ["x"]}',
        json.dumps({"revision": 1, "servers": [ME, ME]}),
        json.dumps({"revision": -1, "servers": [ME]}),
        json.dumps({"revision": 1, "servers": [ME], "more": 1}),
        json.dumps({"revision": 1, "servers": [f"{n:032x}" for n in range(100)]}),
    ],
)
def test_a_roster_that_is_none_stops_everything(
    paths: Paths, api: FakeApi, annotation: str
) -> None:
    """Else revision 0 would stand again, and machines would change their roles."""
    version = view_of(paths, HOLD).lease_version
    lease(api)["metadata"]["annotations"] = {"k3sagentd/roster": annotation}
    result = carry_out(paths, replace(HOLD, lease_version=version))
    assert (result.outcome, result.view) == (Outcome.FAILED, None)
    assert "is no roster" in str(result.reason)
    assert "PUT" not in " ".join(api.requests)


def test_a_lease_of_somebody_else_is_left_alone(paths: Paths, api: FakeApi) -> None:
    version = view_of(paths, HOLD).lease_version
    lease(api)["spec"]["holderIdentity"] = "some-controller"
    result = carry_out(paths, replace(HOLD, lease_version=version))
    assert "is held by 'some-controller'" in str(result.reason)
    assert lease(api)["spec"]["holderIdentity"] == "some-controller"


# --- removing -------------------------------------------------------------------------------


def servers(ready: int, dead: int) -> list[KubeNode]:
    """Some that are ready, and some that are not; the last of them is removed."""
    return [
        KubeNode(name=f"n{n}", uid=UID, node=None, hardware=None, server=True, ready=n < ready)
        for n in range(ready + dead)
    ]


@pytest.mark.parametrize(
    ("ready", "dead", "may"),
    [
        # The last one that is named goes: a dead one where there is one.
        (1, 0, False), (2, 0, True), (3, 0, True), (4, 0, True), (5, 0, True),
        (0, 1, False), (1, 1, True), (2, 1, True), (3, 1, True), (4, 1, True),
        (0, 2, False), (1, 2, False), (2, 2, True), (3, 2, True),
        (2, 3, False), (3, 3, True), (3, 4, False), (4, 3, True),
    ],
)  # fmt: skip
def test_the_quorum_of_those_that_stay(ready: int, dead: int, may: bool) -> None:
    found = servers(ready, dead)
    trouble = removal_trouble(found, found[-1].name)
    assert (trouble is None) is may, trouble
    assert may or "would cost the quorum" in str(trouble)
    agent = replace(found[0], name="agent", server=False)
    assert removal_trouble([*found, agent], "agent") is None
    assert (removal_trouble([*found, agent], found[-1].name) is None) is may


def removal(paths: Paths, api: FakeApi, name: str, uid: str, **other: object) -> ErrandResult:
    version = lease(api)["metadata"]["resourceVersion"] if api.leases else None
    errand = replace(HOLD, lease_version=version, remove=name, uid=uid, **other)
    result = carry_out(paths, errand)
    assert result.view is not None
    return result


def test_a_dead_server_is_removed_once(paths: Paths, api: FakeApi) -> None:
    three_servers(api)
    uid = api.add_node("n3", server=True, ready=False)
    result = removal(paths, api, "n3", uid)
    assert result.outcome is Outcome.DONE, result.reason
    assert [node.name for node in result.view.nodes] == ["n1", "n2"]
    assert removal(paths, api, "n3", uid).outcome is Outcome.DONE  # gone already


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda api: api.add_node("n3", server=True, ready=False), "it is another one now"),
        (lambda api: api.add_node("n2", server=True, ready=False), "would cost the quorum"),
        (lambda api: [api.nodes.pop(each) for each in ("n1", "n2")], "it is the last server"),
        (lambda api: api.nodes["n3"]["status"]["conditions"][1].update(status="True"), "not dead"),
        (
            lambda api: api.nodes["n3"]["metadata"]["labels"].update({"k3sagentd/node-id": ME}),
            "is of this machine",
        ),
    ],
)
def test_what_is_not_removed(
    paths: Paths, api: FakeApi, change: Callable[[FakeApi], object], said: str
) -> None:
    three_servers(api)
    uid = api.add_node("n3", server=True, ready=False)
    change(api)
    result = removal(paths, api, "n3", uid)
    assert result.outcome is Outcome.FAILED
    assert said in str(result.reason)
    assert "n3" in api.nodes


def test_a_removal_has_ended_when_the_node_is_gone(
    paths: Paths, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "GONE_POLL_S", 0.01)
    three_servers(api)
    uid = api.add_node("n3", server=True, ready=False)
    api.lingers = 3
    result = removal(paths, api, "n3", uid)
    assert result.outcome is Outcome.DONE
    assert [node.name for node in result.view.nodes] == ["n1", "n2"]
    monkeypatch.setattr(kube, "GONE_TIMEOUT_S", 0.1)
    api.lingers = 1000
    uid = api.add_node("n4", server=True, ready=False)
    result = removal(paths, api, "n4", uid)
    assert "the Node n4 is still being deleted" in str(result.reason)


def test_a_node_that_changes_while_it_is_judged_stays(paths: Paths, api: FakeApi) -> None:
    three_servers(api)
    uid = api.add_node("n3", server=True, ready=False)

    def comes_back(method: str, path: str) -> None:
        if method == "DELETE":
            api.nodes["n3"]["metadata"]["resourceVersion"] = api.version()

    api.before = comes_back
    result = removal(paths, api, "n3", uid)
    assert "Precondition failed: resourceVersion" in str(result.reason)
    assert "n3" in api.nodes


def test_who_leaves_is_ready_and_drained_first(paths: Paths, api: FakeApi) -> None:
    uids = three_servers(api)
    k3s(paths, f'echo "$@" > {paths.root}/said')
    result = removal(paths, api, "n3", uids["n3"], dead=False, drain="n3", release=True)
    assert result.outcome is Outcome.DONE, result.reason
    assert "n3" not in api.nodes
    assert result.view.holder is None
    said = (paths.root / "said").read_text()
    assert said.startswith("kubectl drain n3 --ignore-daemonsets --delete-emptydir-data --force ")


def test_a_drain_that_fails_removes_nothing(paths: Paths, api: FakeApi) -> None:
    uids = three_servers(api)
    k3s(paths, "echo 'error: cannot evict pod' >&2; exit 1")
    result = removal(paths, api, "n3", uids["n3"], dead=False, drain="n3")
    assert "kubectl drain n3 ended with 1: error: cannot evict pod" in str(result.reason)
    assert "n3" in api.nodes
    k3s(paths, "exit 1")
    assert removal(paths, api, "gone", UID, drain="gone").outcome is Outcome.DONE


def test_who_took_the_lease_during_the_drain_decides(paths: Paths, api: FakeApi) -> None:
    uids = three_servers(api)
    k3s(paths, "exit 0")

    def taken(method: str, path: str) -> None:
        if path == "/api/v1/nodes" and api.leases:
            lease(api)["metadata"]["resourceVersion"] = api.version()

    api.before = taken
    result = removal(paths, api, "n3", uids["n3"], dead=False, drain="n3")
    assert "the object has been modified" in str(result.reason)
    assert "n3" in api.nodes


# --- the two files --------------------------------------------------------------------------


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


# --- the daemon's side ----------------------------------------------------------------------


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


def test_the_leases_address_is_kubernetes_own() -> None:
    assert kube.LEASES == LEASES
