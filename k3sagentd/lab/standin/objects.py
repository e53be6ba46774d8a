# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects over the store: what an API server does with each of them, and its errors.

Every write compares the revision that it read (k8s.io/apiserver, pkg/storage/etcd3), so that
several servers at once are right. Who may ask is not known here.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from k3sagentd.lab.standin.store import Entry, Store

Object = dict[str, Any]
ATTEMPTS = 20
"""At a change that others overtake (k8s.io/apiserver retries without end)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of object."""

    api_version: str
    kind: str
    resource: str
    """As error messages name it."""
    prefix: str
    """Of its keys in the store; below it the name, with the namespace before it if it has one."""


NODE = Kind(api_version="v1", kind="Node", resource="nodes", prefix="/registry/minions/")
LEASE = Kind(
    api_version="coordination.k8s.io/v1",
    kind="Lease",
    resource="leases.coordination.k8s.io",
    prefix="/registry/leases/",
)


class ApiError(Exception):
    """The API server refuses, with a Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason

    def status(self) -> Object:
        """As it is sent."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }


def conflict(kind: Kind, name: str, why: str | None = None) -> ApiError:
    """The object is not as the request assumes."""
    changed = (
        "the object has been modified; please apply your changes to the latest version and try "
        "again"
    )
    message = f'Operation cannot be fulfilled on {kind.resource} "{name}": {why or changed}'
    return ApiError(409, "Conflict", message)


def invalid(kind: Kind, name: str, why: str) -> ApiError:
    """The object is not one of its kind."""
    return ApiError(422, "Invalid", f'{kind.kind} "{name}" is invalid: {why}')


def now() -> str:
    """As in ``creationTimestamp``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now_micro() -> str:
    """As in ``renewTime``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Objects:
    """All objects; a name is ``NAMESPACE/NAME`` where the kind has namespaces."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, kind: Kind, name: str) -> Object:
        """One; raises ApiError."""
        entry = await self._store.get(kind.prefix + name)
        if entry is None:
            short = name.rpartition("/")[2]
            raise ApiError(404, "NotFound", f'{kind.resource} "{short}" not found')
        return _object(entry)

    async def list(self, kind: Kind, namespace: str = "") -> Object:
        """All, as the API's list object."""
        found = await self._store.list(kind.prefix + namespace)
        return {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": {"resourceVersion": str(found.revision)},
            "items": [_object(entry) for entry in found.entries],
        }

    async def create(self, kind: Kind, name: str, wanted: Object) -> Object:
        """Make a new one; raises ApiError."""
        new = copy.deepcopy(wanted)
        namespace, _, short = name.rpartition("/")
        meta = new.setdefault("metadata", {})
        if meta.pop("resourceVersion", ""):
            why = "resourceVersion should not be set on objects to be created"
            raise ApiError(400, "BadRequest", why)
        meta |= {"name": short, "uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if namespace:
            meta["namespace"] = namespace
        new |= {"kind": kind.kind, "apiVersion": kind.api_version}
        _validate(kind, new)
        revision = await self._store.put(kind.prefix + name, json.dumps(new), revision=0)
        if revision is None:
            raise ApiError(409, "AlreadyExists", f'{kind.resource} "{short}" already exists')
        meta["resourceVersion"] = str(revision)
        return new

    async def replace(self, kind: Kind, name: str, wanted: Object) -> Object:
        """Put ``wanted`` in the place of what has its resourceVersion; raises ApiError."""
        short = name.rpartition("/")[2]
        meta = wanted.get("metadata") or {}
        version = meta.get("resourceVersion")
        if meta.get("name", short) != short:
            why = f"the name of the object ({meta['name']}) does not match the name on the URL"
            raise ApiError(400, "BadRequest", f"{why} ({short})")

        def swap(old: Object) -> Object:
            if not version:
                why = (
                    "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
                )
                raise invalid(kind, short, why)
            return copy.deepcopy(wanted)

        return await self.change(kind, name, swap, version=version)

    async def change(
        self,
        kind: Kind,
        name: str,
        how: Callable[[Object], Object],
        *,
        version: str | None = None,
    ) -> Object:
        """Make of the object what ``how`` makes of it, whoever else writes; raises ApiError.

        With ``version`` only if that is its resourceVersion.
        """
        short = name.rpartition("/")[2]
        for _ in range(ATTEMPTS):
            old = await self.get(kind, name)
            if version and version != old["metadata"]["resourceVersion"]:
                raise conflict(kind, short)
            new = how(copy.deepcopy(old))
            meta = new.setdefault("metadata", {})
            if meta.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
                why = f"Precondition failed: UID in precondition: {meta['uid']}, UID in object "
                raise conflict(kind, short, f"{why}meta: {old['metadata']['uid']}")
            fixed = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp")
            meta |= {key: old["metadata"][key] for key in fixed if key in old["metadata"]}
            new |= {"kind": kind.kind, "apiVersion": kind.api_version}
            revision = int(old["metadata"]["resourceVersion"])
            meta["resourceVersion"] = str(revision)
            if new == old:
                return old
            _validate(kind, new)
            if meta.get("deletionTimestamp") and not meta.get("finalizers"):
                if await self._store.delete(kind.prefix + name, revision=revision):
                    return new
                continue
            written = await self._write(kind, name, new, revision)
            if written is not None:
                return written
        raise conflict(kind, short)

    async def _write(self, kind: Kind, name: str, new: Object, revision: int) -> Object | None:
        del new["metadata"]["resourceVersion"]
        written = await self._store.put(kind.prefix + name, json.dumps(new), revision=revision)
        if written is None:
            return None
        new["metadata"]["resourceVersion"] = str(written)
        return new

    async def delete(self, kind: Kind, name: str, options: Object) -> tuple[Object, bool]:
        """Delete, under DeleteOptions; the object, and whether it is gone; raises ApiError.

        One with finalizers is only marked: it is gone when they are.
        """
        short = name.rpartition("/")[2]
        wanted = options.get("preconditions") or {}
        for _ in range(ATTEMPTS):
            old = await self.get(kind, name)
            meta = old["metadata"]
            for key, word in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
                if wanted.get(key) not in (None, meta[key]):
                    why = f"the {word} in the precondition ({wanted[key]}) does not match the "
                    raise conflict(kind, short, f"{why}{word} in record ({meta[key]})")
            revision = int(meta["resourceVersion"])
            if not meta.get("finalizers"):
                if await self._store.delete(kind.prefix + name, revision=revision):
                    return old, True
                continue
            if meta.get("deletionTimestamp"):
                return old, False
            meta |= {"deletionTimestamp": now(), "deletionGracePeriodSeconds": 0}
            written = await self._write(kind, name, old, revision)
            if written is not None:
                return written, False
        raise conflict(kind, short)


def _object(entry: Entry) -> Object:
    found: Object = json.loads(entry.value)
    found["metadata"]["resourceVersion"] = str(entry.revision)
    return found


ANNOTATIONS_LIMIT_BYTES = 256 * 1024
"""k8s.io/apimachinery, pkg/api/validation: TotalAnnotationSizeLimitB."""
MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
"""k8s.io/apimachinery, pkg/apis/meta/v1/micro_time.go: RFC3339Micro."""
LEASE_FIELDS: dict[str, type] = {
    "holderIdentity": str,
    "leaseDurationSeconds": int,
    "leaseTransitions": int,
    "acquireTime": str,
    "renewTime": str,
}


def _validate(kind: Kind, new: Object) -> None:
    meta, name = new["metadata"], new["metadata"]["name"]
    for key in ("labels", "annotations"):
        pairs = meta.get(key) or {}
        if not all(isinstance(text, str) for pair in pairs.items() for text in pair):
            raise ApiError(400, "BadRequest", f"{kind.kind} {name}: {key} are not all strings")
    annotations = meta.get("annotations") or {}
    if sum(len(k) + len(v) for k, v in annotations.items()) > ANNOTATIONS_LIMIT_BYTES:
        why = (
            f"metadata.annotations: Too long: may not be more than {ANNOTATIONS_LIMIT_BYTES} bytes"
        )
        raise invalid(kind, name, why)
    if kind is not LEASE:
        return
    for key, value in (new.get("spec") or {}).items():
        if key not in LEASE_FIELDS:
            raise ApiError(400, "BadRequest", f'unknown field "spec.{key}"')
        if value is not None and type(value) is not LEASE_FIELDS[key]:
            raise ApiError(400, "BadRequest", f"spec.{key} is {value!r}")
        if key.endswith("Time") and value is not None and not MICRO_TIME.fullmatch(str(value)):
            raise ApiError(400, "BadRequest", f"spec.{key} is {value!r}, no time in microseconds")
    if (new.get("spec") or {}).get("leaseDurationSeconds", 1) in range(-(2**31), 1):
        raise invalid(kind, name, "spec.leaseDurationSeconds: must be greater than 0")
