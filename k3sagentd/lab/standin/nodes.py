# SPDX-License-Identifier: Apache-2.0
"""Node objects: how a kubelet makes and keeps its own, and the password that guards its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from k3sagentd.lab.standin.objects import LEASE, NODE, ApiError, Object, Objects, now, now_micro
from k3sagentd.lab.standin.options import Options
from k3sagentd.lab.standin.store import Store

PASSWORDS = "/registry/secrets/kube-system/"
BEATS = "kube-node-lease"
"""Namespace of the Leases that kubelets renew."""
BEAT_S = 10.0
"""A kubelet renews every 10 s (nodeLeaseDurationSeconds 40, a quarter of it)."""
NAME_ANNOTATION = "etcd.k3s.cattle.io/node-name"
ADDRESS_ANNOTATION = "etcd.k3s.cattle.io/node-address"
CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
ETCD_ROLE = "node-role.kubernetes.io/etcd"
NODE_FINALIZER = "wrangler.cattle.io/node"
ETCD_FINALIZER = "wrangler.cattle.io/managed-etcd-controller"
"""K3s's controllers hold a deleted Node until they have done their part."""


def password_key(name: str) -> str:
    """Where the store has the hash of a node's password (K3S.md 7)."""
    return f"{PASSWORDS}{name}.node-password.k3s"


async def check_password(store: Store, name: str, password: str) -> bool:
    """Whether a node may have that name: the first that asks sets the password."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    key = password_key(name)
    if await store.put(key, digest, revision=0) is not None:
        return True
    found = await store.get(key)
    return found is not None and found.value == digest


def new_node(options: Options, version: str) -> Object:
    """The Node that a kubelet registers; labels count only now (kubelet, ``--node-labels``)."""
    name = options.node_name
    own = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "labels": own | {"node.kubernetes.io/instance-type": "k3s"} | options.labels,
            "annotations": {"k3s.io/hostname": name, "k3s.io/internal-ip": options.node_ip},
        },
        "spec": {"providerID": f"k3s://{name}"},
        "status": status(options, version),
    }


def status(options: Options, version: str) -> Object:
    """What a kubelet says of a machine that is well."""
    return {
        "addresses": [
            {"type": "InternalIP", "address": options.node_ip},
            {"type": "Hostname", "address": options.node_name},
        ],
        "conditions": [ready_condition("True")],
        "nodeInfo": {"kubeletVersion": version},
    }


def ready_condition(value: str) -> Object:
    """The condition Ready: ``True`` from the kubelet, ``Unknown`` from who misses it."""
    reasons = {
        "True": ("KubeletReady", "kubelet is posting ready status"),
        "Unknown": ("NodeStatusUnknown", "Kubelet stopped posting node status."),
    }
    reason, message = reasons[value]
    condition = {"type": "Ready", "status": value, "reason": reason, "message": message}
    return condition | {"lastTransitionTime": now()}


def readiness(node: Object) -> str:
    """The status of the condition Ready."""
    for each in (node.get("status") or {}).get("conditions") or []:
        if each.get("type") == "Ready":
            return str(each.get("status"))
    return "Unknown"


def beat(name: str) -> Object:
    """The Lease that a kubelet writes; the caller adds a resourceVersion to one that exists."""
    return {
        "metadata": {"name": name, "namespace": BEATS},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now_micro()},
    }


class OwnNode:
    """The Node of a server: its kubelet, and what K3s's controllers add to it."""

    def __init__(
        self, objects: Objects, options: Options, version: str, member_name: str | None
    ) -> None:
        self._objects = objects
        self._options = options
        self._version = version
        self._member_name = member_name
        self._name = options.node_name

    async def register(self) -> None:
        """Make it, or take up the one that is there; raises ApiError."""
        wanted = new_node(self._options, self._version)
        try:
            await create_node(self._objects, self._name, wanted)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        await self._objects.change(NODE, self._name, self._complete)

    def _complete(self, node: Object) -> Object:
        meta = node["metadata"]
        labels: dict[str, str] = meta.setdefault("labels", {})
        labels |= {CONTROL_PLANE: "true", "node-role.kubernetes.io/master": "true"}
        if self._member_name is not None:
            labels[ETCD_ROLE] = "true"
            own = {NAME_ANNOTATION: self._member_name, ADDRESS_ANNOTATION: self._options.node_ip}
            meta["annotations"] = (meta.get("annotations") or {}) | own
            add_finalizer(meta, ETCD_FINALIZER)
        node["status"] = (node.get("status") or {}) | status(self._options, self._version)
        return node

    async def beat(self) -> None:
        """Renew; a Node that was deleted stays away until the next start. Raises ApiError."""
        node = await self._objects.get(NODE, self._name)
        key = f"{BEATS}/{self._name}"
        renewed = beat(self._name)
        try:
            await self._objects.change(LEASE, key, lambda old: old | {"spec": renewed["spec"]})
        except ApiError as error:
            if error.code != 404:
                raise
            await self._objects.create(LEASE, key, renewed)
        if readiness(node) != "True":
            well = status(self._options, self._version)
            await self._objects.change(NODE, self._name, lambda old: old | {"status": well})


async def create_node(objects: Objects, name: str, wanted: Mapping[str, object]) -> Object:
    """Create a Node as K3s has it a moment later: held by its controllers."""
    new: Object = dict(wanted)
    new["metadata"] = dict(new.get("metadata") or {})
    add_finalizer(new["metadata"], NODE_FINALIZER)
    return await objects.create(NODE, name, new)


def add_finalizer(meta: Object, finalizer: str) -> None:
    """Unless it is being deleted, when none may be added."""
    if not meta.get("deletionTimestamp"):
        meta["finalizers"] = list(dict.fromkeys([*(meta.get("finalizers") or []), finalizer]))
