# SPDX-License-Identifier: Apache-2.0
"""What root sees in the Kubernetes API, and what it does not believe."""

from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.k3s import Outcome, release_key
from k3sagentd.errors import MachineError
from k3sagentd.k3s import kube
from k3sagentd.k3s.errand import carry_out
from k3sagentd.k3s.kube import Kube
from k3sagentd.paths import Paths
from tests.unit.fake_api import LEASES, FakeApi
from tests.unit.kube.asked import LOOK, YOU, view_of


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


def test_the_leases_address_is_kubernetes_own() -> None:
    assert kube.LEASES == LEASES
