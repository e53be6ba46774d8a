# SPDX-License-Identifier: Apache-2.0
"""What the leading server does for the cluster: misses silent Nodes, cleans up after deleted ones.

As kube-controller-manager's node lifecycle and K3s's etcd member controller
(pkg/etcd/member_controller.go) do. One server leads: the one whose etcd does.
"""

from __future__ import annotations

import time

from k3sagentd.lab.standin.members import Members
from k3sagentd.lab.standin.nodes import (
    ADDRESS_ANNOTATION,
    BEATS,
    ETCD_FINALIZER,
    ETCD_ROLE,
    NAME_ANNOTATION,
    NODE_FINALIZER,
    password_key,
    readiness,
    ready_condition,
)
from k3sagentd.lab.standin.objects import LEASE, NODE, ApiError, Object, Objects
from k3sagentd.lab.standin.options import log
from k3sagentd.lab.standin.store import Store

REMOVE_ANNOTATION = "etcd.k3s.cattle.io/remove"
REMOVED_ANNOTATION = "etcd.k3s.cattle.io/removed-node-name"


class Controllers:
    """One look at all Nodes at a time; ``members`` is None without etcd."""

    def __init__(
        self, store: Store, objects: Objects, members: Members | None, *, node_grace_s: float
    ) -> None:
        self._store = store
        self._objects = objects
        self._members = members
        self._grace_s = node_grace_s
        self._heard: dict[str, tuple[str, float]] = {}
        """Of each Node: the revision of its heartbeat, and when that was first seen here."""

    async def tick(self) -> None:
        """Do what is to be done now; raises EtcdError."""
        if self._members is not None and not await self._members.etcd.leads():
            self._heard.clear()
            return
        beats = (await self._objects.list(LEASE, f"{BEATS}/"))["items"]
        versions = {m["metadata"]["name"]: m["metadata"]["resourceVersion"] for m in beats}
        for node in (await self._objects.list(NODE))["items"]:
            try:
                if node["metadata"].get("deletionTimestamp"):
                    await self._finalize(node)
                else:
                    await self._remove_if_asked(node)
                    await self._listen(node, versions.get(node["metadata"]["name"], ""))
            except ApiError as error:
                log.info("error syncing %r: %s", node["metadata"]["name"], error)

    async def _listen(self, node: Object, version: str) -> None:
        """The clock is this server's own, and starts when it begins to lead."""
        name, now_s = node["metadata"]["name"], time.monotonic()
        known = self._heard.get(name)
        if known is None or known[0] != version:
            self._heard[name] = (version, now_s)
        elif now_s - known[1] > self._grace_s and readiness(node) != "Unknown":
            log.info("node %s is not heard", name)
            await self._objects.change(NODE, name, _unknown)

    async def _finalize(self, node: Object) -> None:
        """A member goes before its Node does, and with the Node the password of its name."""
        meta = node["metadata"]
        name = meta["name"]
        annotations = meta.get("annotations") or {}
        if ETCD_ROLE in (meta.get("labels") or {}) and REMOVED_ANNOTATION not in annotations:
            log.info("Removing etcd member %s from cluster", name)
            await self._remove_member(name, annotations)
        await self._store.delete(password_key(name))
        await self._store.delete(f"{LEASE.prefix}{BEATS}/{name}")
        self._heard.pop(name, None)

        def release(old: Object) -> Object:
            ours = (NODE_FINALIZER, ETCD_FINALIZER)
            kept = [each for each in old["metadata"].get("finalizers") or [] if each not in ours]
            old["metadata"]["finalizers"] = kept
            return old

        await self._objects.change(NODE, name, release)

    async def _remove_if_asked(self, node: Object) -> None:
        """The member alone, by an annotation (pkg/etcd/member_controller.go, sync)."""
        annotations = node["metadata"].get("annotations") or {}
        asked = annotations.get(REMOVE_ANNOTATION, "").lower() == "true"
        if not asked or REMOVED_ANNOTATION in annotations:
            return
        name = node["metadata"]["name"]
        await self._remove_member(name, annotations)

        def note(old: Object) -> Object:
            found = old["metadata"].setdefault("annotations", {})
            found[REMOVED_ANNOTATION] = found.pop(NAME_ANNOTATION, "")
            found.pop(ADDRESS_ANNOTATION, None)
            return old

        await self._objects.change(NODE, name, note)

    async def _remove_member(self, node: str, annotations: dict[str, str]) -> None:
        for key in (NAME_ANNOTATION, ADDRESS_ANNOTATION):
            if key not in annotations:
                what = "name" if key == NAME_ANNOTATION else "address"
                why = f"node {what} annotation for node {node} not found"
                raise ApiError(500, "InternalError", why)
        if self._members is not None:
            await self._members.remove(
                annotations[NAME_ANNOTATION], annotations[ADDRESS_ANNOTATION]
            )


def _unknown(node: Object) -> Object:
    conditions = (node.get("status") or {}).get("conditions") or []
    others = [each for each in conditions if each.get("type") != "Ready"]
    node["status"] = (node.get("status") or {}) | {
        "conditions": [*others, ready_condition("Unknown")]
    }
    return node
