# SPDX-License-Identifier: Apache-2.0
"""The stand-in's own rules, as far as they need no machine: objects, membership, options."""

import asyncio
import json
import sqlite3
import sys
from pathlib import Path

import pytest

from k3sagentd.lab.standin import nodes, options
from k3sagentd.lab.standin.api import merged
from k3sagentd.lab.standin.etcd import TOMBSTONE, Etcd
from k3sagentd.lab.standin.members import DuplicateNameError, Members
from k3sagentd.lab.standin.objects import LEASE, NODE, ApiError, Objects
from k3sagentd.lab.standin.server import migrates
from k3sagentd.lab.standin.store import SqliteStore

TIME = "2026-01-01T00:00:00.000000Z"


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "state.db")


@pytest.fixture
def objects(store: SqliteStore) -> Objects:
    return Objects(store)


def refused(coroutine) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        asyncio.run(coroutine)
    return caught.value.code, caught.value.reason


def test_a_write_depends_on_the_revision_that_was_read(store: SqliteStore) -> None:
    async def play() -> None:
        first = await store.put("/a", "1", revision=0)
        assert first is not None
        assert await store.put("/a", "2", revision=0) is None
        second = await store.put("/a", "2", revision=first)
        assert second is not None
        assert second > first
        assert await store.put("/a", "3", revision=first) is None
        assert not await store.delete("/a", revision=first)
        assert await store.delete("/a", revision=second)
        assert await store.get("/a") is None
        assert await store.put("/a", "4", revision=0) is not None

    asyncio.run(play())


def test_rows_of_kine_are_read_as_kine_means_them(tmp_path: Path, store: SqliteStore) -> None:
    asyncio.run(store.put("/registry/a", "old"))
    with sqlite3.connect(tmp_path / "state.db") as database:
        for name, deleted, value in (
            ("/registry/a", 0, b"new"),
            ("/registry/b", 0, b"b"),
            ("/registry/b", 1, b""),
        ):
            database.execute(
                "INSERT INTO kine (name, deleted, value) VALUES (?, ?, ?)", (name, deleted, value)
            )
    entries = asyncio.run(store.list("/registry/")).entries
    assert [(each.key, each.value) for each in entries] == [("/registry/a", "new")]


def lease(version: str | None = None, **spec: object) -> dict:
    meta = {"name": "k3sagentd"} | ({"resourceVersion": version} if version else {})
    return {"metadata": meta, "spec": spec}


def test_a_lease_is_written_only_by_who_saw_its_last_version(objects: Objects) -> None:
    name = "kube-system/k3sagentd"
    made = asyncio.run(objects.create(LEASE, name, lease(holderIdentity="a", renewTime=TIME)))
    version = made["metadata"]["resourceVersion"]
    assert refused(objects.create(LEASE, name, lease())) == (409, "AlreadyExists")
    assert refused(objects.replace(LEASE, name, lease())) == (422, "Invalid")
    changed = asyncio.run(objects.replace(LEASE, name, lease(version, holderIdentity="b")))
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]
    assert changed["metadata"]["resourceVersion"] != version
    assert refused(objects.replace(LEASE, name, lease(version, holderIdentity="c"))) == (
        409,
        "Conflict",
    )
    assert refused(objects.replace(LEASE, "kube-system/x", lease(version)))[0] in (400, 404)
    options_ = {"preconditions": {"resourceVersion": version}}
    assert refused(objects.delete(LEASE, name, options_)) == (409, "Conflict")
    assert asyncio.run(objects.delete(LEASE, name, {}))[1]
    assert refused(objects.get(LEASE, name)) == (404, "NotFound")


@pytest.mark.parametrize(
    "spec",
    [
        {"renewTime": "2026-01-01T00:00:00Z"},
        {"renewTime": 1.5},
        {"leaseDurationSeconds": 0},
        {"leaseDurationSeconds": "40"},
        {"holder": "a"},
    ],
)
def test_a_lease_that_kubernetes_does_not_take(objects: Objects, spec: dict) -> None:
    assert refused(objects.create(LEASE, "kube-system/k3sagentd", lease(**spec)))[0] in (400, 422)


def test_a_node_with_finalizers_stays_until_they_are_gone(objects: Objects) -> None:
    made = asyncio.run(nodes.create_node(objects, "a", {"metadata": {"name": "a"}}))
    wrong = {"preconditions": {"uid": "another"}}
    assert refused(objects.delete(NODE, "a", wrong)) == (409, "Conflict")
    right = {"preconditions": {"uid": made["metadata"]["uid"]}}
    found, gone = asyncio.run(objects.delete(NODE, "a", right))
    assert not gone
    assert found["metadata"]["deletionTimestamp"]

    def release(node: dict) -> dict:
        node["metadata"]["finalizers"] = []
        return node

    asyncio.run(objects.change(NODE, "a", release))
    assert refused(objects.get(NODE, "a")) == (404, "NotFound")


def test_changes_at_once_are_all_done(objects: Objects) -> None:
    async def play() -> None:
        await objects.create(NODE, "a", {"metadata": {"name": "a"}, "spec": {"count": 0}})

        def more(node: dict) -> dict:
            node["spec"]["count"] += 1
            return node

        await asyncio.gather(*(objects.change(NODE, "a", more) for _ in range(10)))
        assert (await objects.get(NODE, "a"))["spec"]["count"] == 10

    asyncio.run(play())


def test_merge_patch_as_rfc_7386_has_it() -> None:
    value = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1]}
    assert merged(value, {"b": {"c": None, "x": 4}, "e": [2]}) == {
        "a": 1,
        "b": {"d": 3, "x": 4},
        "e": [2],
    }


def test_the_first_sets_the_password_of_a_name(store: SqliteStore) -> None:
    async def play() -> None:
        assert await nodes.check_password(store, "a", "one")
        assert await nodes.check_password(store, "a", "one")
        assert not await nodes.check_password(store, "a", "two")
        await store.delete(nodes.password_key("a"))
        assert await nodes.check_password(store, "a", "two")

    asyncio.run(play())


class FakeEtcd(Etcd):
    """A member list without etcd."""

    def __init__(self, directory: Path, *members: tuple[str, str]) -> None:
        super().__init__(directory, "10.0.0.9", tombstone=True)
        self.list = [{"ID": u, "name": n, "peerURLs": [u]} for n, u in members]
        self.calls: list[str] = []

    async def members(self) -> list[dict]:
        return self.list

    async def call(self, path: str, body: dict) -> dict:
        self.calls.append(f"{path} {json.dumps(body)}")
        return {}


def url(number: int) -> str:
    return f"http://10.0.0.{number}:2380"


@pytest.mark.parametrize("taken", ["pi-0a1b2c3d", "pi"])
def test_a_second_member_of_a_node_name_is_refused(tmp_path: Path, taken: str) -> None:
    members = Members(FakeEtcd(tmp_path, (taken, url(1))), "x", "10.0.0.9")
    with pytest.raises(DuplicateNameError):
        asyncio.run(members.add("pi", "pi-99999999", url(2)))


def test_who_was_added_and_died_before_its_first_start_goes_on(tmp_path: Path) -> None:
    etcd = FakeEtcd(tmp_path, ("pi-2-0a1b2c3d", url(1)), ("", url(2)))
    cluster = asyncio.run(Members(etcd, "x", "10.0.0.9").add("pi", "pi-99999999", url(2)))
    assert cluster == [f"pi-2-0a1b2c3d={url(1)}"]
    assert etcd.calls == []


def test_only_the_member_of_that_name_and_address_is_removed(tmp_path: Path) -> None:
    etcd = FakeEtcd(tmp_path, ("a-1", url(1)), ("b-1", url(2)))
    members = Members(etcd, "x", "10.0.0.9")
    asyncio.run(members.remove("a-1", "10.0.0.2"))
    asyncio.run(members.remove("b-2", "10.0.0.2"))
    assert etcd.calls == []
    asyncio.run(members.remove("b-1", "10.0.0.2"))
    assert etcd.calls == [f'cluster/member/remove {{"ID": "{url(2)}"}}']


def watch(etcd: Etcd) -> None:
    while True:
        etcd.check_alive()


@pytest.mark.parametrize(
    ("last_words", "code"),
    [
        ("E | etcdserver: the member has been permanently removed from the cluster", 0),
        ("C | etcdserver/membership: failed to find local ID 1f in cluster 2c", 2),
        ('{"level":"panic","msg":"failed to find local ID in cluster members"}', 2),
    ],
)
def test_a_removed_member_leaves_a_tombstone_however_etcd_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last_words: str, code: int
) -> None:
    program = tmp_path / "bin/etcd"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{last_words}' >&2\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr("k3sagentd.lab.standin.etcd.fatal", sys.exit)
    etcd = Etcd(tmp_path / "etcd", "127.0.0.1", tombstone=True)
    etcd.start("a", None, new=False)
    with pytest.raises(SystemExit, match="has been removed from the cluster"):
        watch(etcd)
    assert (tmp_path / "etcd" / TOMBSTONE).exists()


def test_the_command_line_beats_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Somewhere:
        k3s_config = tmp_path / "config.yaml"

    Somewhere.k3s_config.write_text("token: file\nnode-label: [a/b=c, d=e]\n")
    monkeypatch.setattr(options, "Paths", Somewhere)
    monkeypatch.setenv("K3S_URL", "https://from-environment:6443")
    found = options.load(["--token", "line", "--cluster-reset", "--node-name=N1"])
    assert found.token == "line"
    assert found.cluster_reset
    assert found.node_name == "n1"
    assert found.server == "https://from-environment:6443"
    assert found.labels == {"a/b": "c", "d": "e"}


def test_older_releases_start_empty_beside_sqlite() -> None:
    assert migrates("v1.33.4+k3s1")
    assert migrates("v1.22.2+k3s1")
    assert not migrates("v1.22.1+k3s2")
    assert not migrates("v1.21.14+k3s1")
