# SPDX-License-Identifier: Apache-2.0
"""Keys, values and revisions: in etcd, or in the one SQLite file of a single server (kine).

What is written may depend on the revision that was read, atomically; all that the Kubernetes API
promises rests on that. Knows nothing of what the values mean.
"""

from __future__ import annotations

import base64
import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from k3sagentd.lab.standin.etcd import Etcd

KINE = """
CREATE TABLE IF NOT EXISTS kine (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, created INTEGER, deleted INTEGER,
    create_revision INTEGER, prev_revision INTEGER, lease INTEGER, value BLOB, old_value BLOB)
"""
"""The table of K3s's SQLite backend (k3s-io/kine, pkg/drivers/sqlite)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key as it is."""

    key: str
    value: str
    revision: int
    """At which it was last written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All keys below a prefix, at one revision of the store."""

    entries: tuple[Entry, ...]
    revision: int


class Store(Protocol):
    """What both have."""

    async def get(self, key: str) -> Entry | None:
        """One entry, as of now."""

    async def list(self, prefix: str) -> Listing:
        """All below ``prefix``, as of now."""

    async def put(
        self, key: str, value: str, *, revision: int | None = None, ttl_s: int | None = None
    ) -> int | None:
        """Write, and return the new revision.

        With ``revision`` only if the entry has that one (0: only if there is none), else None.
        """

    async def delete(self, key: str, *, revision: int | None = None) -> bool:
        """Delete, with ``revision`` only if the entry has that one; whether it was."""


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()


def _entry(found: dict[str, Any]) -> Entry:
    return Entry(
        key=_text(found["key"]),
        value=_text(found.get("value", "")),
        revision=int(found["mod_revision"]),
    )


class EtcdStore:
    """In etcd: linearizable reads, and transactions that compare revisions."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd

    async def get(self, key: str) -> Entry | None:
        """As the protocol says; raises EtcdError."""
        found = (await self._etcd.call("kv/range", {"key": _b64(key)})).get("kvs")
        return _entry(found[0]) if found else None

    async def list(self, prefix: str) -> Listing:
        """As the protocol says; raises EtcdError."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = await self._etcd.call("kv/range", {"key": _b64(prefix), "range_end": _b64(end)})
        entries = tuple(_entry(each) for each in answer.get("kvs", []))
        return Listing(entries=entries, revision=int(answer["header"]["revision"]))

    async def put(
        self, key: str, value: str, *, revision: int | None = None, ttl_s: int | None = None
    ) -> int | None:
        """As the protocol says; raises EtcdError, after which it may be written or not."""
        request: dict[str, Any] = {"key": _b64(key), "value": _b64(value)}
        if ttl_s is not None:
            request["lease"] = (await self._etcd.call("lease/grant", {"TTL": ttl_s}))["ID"]
        answer = await self._txn(key, revision, {"requestPut": request})
        return int(answer["header"]["revision"]) if answer.get("succeeded") else None

    async def delete(self, key: str, *, revision: int | None = None) -> bool:
        """As the protocol says; raises EtcdError, after which it may be gone or not."""
        request = {"requestDeleteRange": {"key": _b64(key)}}
        return bool((await self._txn(key, revision, request)).get("succeeded"))

    async def _txn(self, key: str, revision: int | None, request: dict[str, Any]) -> dict[str, Any]:
        compare = {
            "key": _b64(key),
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": str(revision),
        }
        body = {"compare": [] if revision is None else [compare], "success": [request]}
        return await self._etcd.call("kv/txn", body)


class SqliteStore:
    """In ``state.db``, as kine writes it: each write is a new row, and its id the revision."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self._path)) as database, database:
            database.execute(KINE)
            yield database

    async def get(self, key: str) -> Entry | None:
        """As the protocol says."""
        found = [each for each in (await self.list(key)).entries if each.key == key]
        return found[0] if found else None

    async def list(self, prefix: str) -> Listing:
        """As the protocol says."""
        with self._open() as database:
            rows = database.execute(
                "SELECT MAX(id), name, deleted, value FROM kine GROUP BY name ORDER BY name"
            ).fetchall()
            revision = database.execute("SELECT COALESCE(MAX(id), 0) FROM kine").fetchone()[0]
        entries = tuple(
            Entry(key=name, value=_plain(value), revision=number)
            for number, name, deleted, value in rows
            if not deleted and name.startswith(prefix)
        )
        return Listing(entries=entries, revision=revision)

    async def put(
        self, key: str, value: str, *, revision: int | None = None, ttl_s: int | None = None
    ) -> int | None:
        """As the protocol says; one process writes, in one thread."""
        return await self._append(key, value, revision, deleted=0)

    async def delete(self, key: str, *, revision: int | None = None) -> bool:
        """As the protocol says."""
        return await self._append(key, "", revision, deleted=1) is not None

    async def _append(
        self, key: str, value: str, revision: int | None, *, deleted: int
    ) -> int | None:
        before = await self.get(key)
        found = 0 if before is None else before.revision
        if revision not in (None, found):
            return None
        with self._open() as database:
            database.execute("DELETE FROM kine WHERE name = ?", (key,))  # kine compacts, too
            cursor = database.execute(
                "INSERT INTO kine (name, created, deleted, prev_revision, value) "
                "VALUES (?, ?, ?, ?, ?)",
                (key, int(found == 0), deleted, found, value.encode()),
            )
            return cursor.lastrowid


def _plain(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
