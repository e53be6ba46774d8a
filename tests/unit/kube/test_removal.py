# SPDX-License-Identifier: Apache-2.0
"""A Node that root removes, and all that it refuses to remove."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from k3sagentd.core.cluster import ErrandResult
from k3sagentd.core.k3s import Outcome
from k3sagentd.k3s import kube
from k3sagentd.k3s.errand import carry_out
from k3sagentd.k3s.quorum import removal_trouble
from k3sagentd.paths import Paths
from tests.unit.fake_api import FakeApi
from tests.unit.kube.asked import HOLD, ME, UID, k3s, lease, servers, three_servers


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
