# SPDX-License-Identifier: Apache-2.0
"""The Lease of the one that decides: made, kept, released, never taken from who has it."""

import json
from dataclasses import replace

import pytest

from k3sagentd.core.cluster import Roster
from k3sagentd.core.k3s import Outcome
from k3sagentd.k3s.errand import carry_out
from k3sagentd.k3s.kube import ConflictError, Kube
from k3sagentd.paths import Paths
from tests.unit.fake_api import FakeApi
from tests.unit.kube.asked import HOLD, ME, YOU, lease, view_of


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
