# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API, as far as root needs it: Nodes, and the one Lease that is ours.

With K3s's own admin certificate, which is on servers only. What the API answers is outside data:
it is bounded, and what has not its form is an error that says what was asked and answered.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

from k3sagentd import schema
from k3sagentd.core.cluster import (
    HARDWARE_LABEL,
    LEASE,
    NODE_LABEL,
    ROSTER_ANNOTATION,
    KubeNode,
    Roster,
)
from k3sagentd.core.k3s import RELEASE
from k3sagentd.core.words import NODE_ID_LENGTH, NodeId
from k3sagentd.errors import DataError, MachineError
from k3sagentd.k3s.trust import trusting
from k3sagentd.paths import Paths

LOCAL = "https://127.0.0.1:6443"
TIMEOUT_S = 10.0
ANSWER_LIMIT_BYTES = 32 * 1024 * 1024
PAGE = 250  # Nodes in one answer; one is some 15 KB with the images that it names
PAGES_LIMIT = 40
GONE_TIMEOUT_S = 60.0
GONE_POLL_S = 0.5
LEASE_DURATION_S = 60
"""``leaseDurationSeconds``, for people who look; who may take it over is decided elsewhere."""
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
ETCD_LABEL = "node-role.kubernetes.io/etcd"
"""K3s, pkg/etcd/etcd.go: on each Node that has a member of etcd."""
NODE_ID = re.compile(rf"[0-9a-f]{{{NODE_ID_LENGTH}}}")
MARK = re.compile(r"[0-9a-f]{16}")
ROSTER_LIMIT = 99
REVISION_LIMIT = 10**9


class ConflictError(MachineError):
    """What was judged is not what is there now: somebody else wrote meanwhile."""


class RefusedError(MachineError):
    """Nobody listens there."""


class NeverServedError(MachineError):
    """K3s has not made the certificates for it yet, which it does before it starts etcd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNode:
    """A Node, and which version of it was seen."""

    node: KubeNode
    version: str
    """resourceVersion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLease:
    """The Lease as it stands in the API; written back whole, so that nothing of it is lost."""

    plain: dict[str, Any]

    @property
    def version(self) -> str:
        """resourceVersion."""
        return _text(_object(self.plain, "metadata"), "resourceVersion")

    @property
    def holder(self) -> NodeId | None:
        """Who holds it; raises MachineError for what is no machine of a site."""
        holder = _object(self.plain, "spec").get("holderIdentity")
        if holder in (None, ""):
            return None
        if not isinstance(holder, str) or not NODE_ID.fullmatch(holder):
            raise MachineError(
                f"the Lease kube-system/{LEASE} is held by {holder!r:.80}, which is no machine of "
                f"ours; if nobody else uses it: kubectl -n kube-system delete lease {LEASE}"
            )
        return NodeId(holder)

    @property
    def roster(self) -> Roster | None:
        """The roster that stands on it; raises MachineError for what is none."""
        annotations = _object(self.plain, "metadata").get("annotations") or {}
        text = annotations.get(ROSTER_ANNOTATION) if isinstance(annotations, dict) else None
        if text is None:
            return None
        try:
            roster = schema.loads(Roster, text)
            check_roster(roster)
        except (DataError, TypeError) as error:
            raise MachineError(
                f"the annotation {ROSTER_ANNOTATION} of the Lease kube-system/{LEASE} is no "
                f"roster: {error}; mend it there"
            ) from error
        return roster


def check_roster(roster: Roster) -> None:
    """Raise DataError unless it has the form of a roster."""
    if not 0 <= roster.revision <= REVISION_LIMIT:
        raise DataError(f"roster.revision is {roster.revision}")
    if not 1 <= len(roster.servers) <= ROSTER_LIMIT:
        raise DataError(f"roster has {len(roster.servers)} servers; 1 to {ROSTER_LIMIT}")
    for server in roster.servers:
        if not NODE_ID.fullmatch(server):
            raise DataError(f"roster has {server!r:.80}, which is no node id")
    if not NODE_ID.fullmatch(roster.init):
        raise DataError(f"roster.init is {roster.init!r:.80}, which is no node id")
    if len(set(roster.servers)) != len(roster.servers):
        raise DataError("roster names a server twice")


class Kube:
    """The API of one server, ``url``; every method raises MachineError."""

    def __init__(self, paths: Paths, url: str = LOCAL) -> None:
        self._url = url
        tls = paths.k3s_data / "server/tls"
        try:
            self._context = trusting((tls / "server-ca.crt").read_bytes())
            self._context.load_cert_chain(tls / "client-admin.crt", tls / "client-admin.key")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            why = getattr(error, "strerror", None) or error
            kind = NeverServedError if isinstance(error, FileNotFoundError) else MachineError
            raise kind(
                f"{tls} has no certificates for the Kubernetes API ({why}); "
                "only a server that was ready once has them"
            ) from error

    # --- Nodes ------------------------------------------------------------------------------

    def nodes(self) -> tuple[FoundNode, ...]:
        """All Nodes, by name."""
        found: list[FoundNode] = []
        more = ""
        for _ in range(PAGES_LIMIT):
            path = f"/api/v1/nodes?limit={PAGE}"
            answer = self._ask("GET", f"{path}&continue={quote(more, safe='')}" if more else path)
            items = answer.get("items") or []
            if not isinstance(items, list):
                raise MachineError(f"{self._url}{path} answers without a list of Nodes")
            found += [_node(each) for each in items]
            token = _object(answer, "metadata").get("continue")
            more = token if isinstance(token, str) else ""
            if not more:
                return tuple(sorted(found, key=lambda each: each.node.name))
        raise MachineError(f"{self._url} has more than {PAGE * PAGES_LIMIT} Nodes")

    def delete_node(self, found: FoundNode) -> None:
        """Delete the Node that was seen, and no other, until it is gone; raises ConflictError.

        K3s keeps it until it has removed the etcd member (its finalizer); a kubelet that came back
        before would lose its Node again.
        """
        path = f"/api/v1/nodes/{quote(found.node.name)}"
        preconditions = {"uid": found.node.uid, "resourceVersion": found.version}
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": preconditions}
        self._ask("DELETE", path, body, missing_ok=True)
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while answer := self._ask("GET", path, missing_ok=True):
            if _object(answer, "metadata").get("uid") != found.node.uid:
                return
            if time.monotonic() > deadline:
                raise MachineError(
                    f"the Node {found.node.name} is still being deleted after {GONE_TIMEOUT_S:.0f} "
                    "s; K3s has not removed its etcd member yet"
                )
            time.sleep(GONE_POLL_S)

    # --- the Lease --------------------------------------------------------------------------

    def lease(self) -> FoundLease | None:
        """Our Lease; None while there is none."""
        answer = self._ask("GET", f"{LEASES}/{LEASE}", missing_ok=True)
        return FoundLease(plain=answer) if answer else None

    def write_lease(
        self, before: FoundLease | None, holder: NodeId | None, roster: Roster | None
    ) -> FoundLease:
        """Write ``holder``, and ``roster`` if given, over what was seen (None: over nothing).

        Raises ConflictError where it is not so any more.
        """
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # a MicroTime
        spec = dict(_object(before.plain, "spec")) if before else {}
        metadata = dict(_object(before.plain, "metadata")) if before else {}
        changes = spec.get("leaseTransitions")
        changes = changes if type(changes) is int else 0
        if holder is None:
            spec.pop("holderIdentity", None)
        elif spec.get("holderIdentity") != holder:
            changes += before is not None
            spec |= {"holderIdentity": str(holder), "acquireTime": now}
        spec |= {
            "renewTime": now,
            "leaseDurationSeconds": LEASE_DURATION_S,
            "leaseTransitions": changes,
        }
        if roster is not None:
            kept = metadata.get("annotations")
            metadata["annotations"] = {
                **(kept if isinstance(kept, dict) else {}),
                ROSTER_ANNOTATION: schema.dumps(roster),
            }
        metadata |= {"name": LEASE, "namespace": "kube-system"}
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }
        if before is None:
            return FoundLease(plain=self._ask("POST", LEASES, body))
        return FoundLease(plain=self._ask("PUT", f"{LEASES}/{LEASE}", body))

    # --- asking -----------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        missing_ok: bool = False,
    ) -> dict[str, Any]:
        """The answer's object; ``{}`` for what is missing and may be."""
        what = f"{method} {self._url}{path}"
        status, data = self._exchange(what, method, path, body)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if status == 404 and missing_ok:
            return {}
        if status in (200, 201, 202) and isinstance(answer, dict):
            return answer
        said = answer.get("message") if isinstance(answer, dict) else None
        text = str(said or data[:200].decode(errors="replace"))[:300].strip()
        # A PUT of what is gone is as late as one of what was changed.
        late = status == 409 or (method, status) == ("PUT", 404)
        kind = ConflictError if late else MachineError
        raise kind(f"{what} was answered {status}: {text}")

    def _exchange(
        self, what: str, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, bytes]:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        text = None if body is None else json.dumps(body)
        parts = urlsplit(self._url)
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=self._context
        )
        try:
            connection.request(method, path, text, headers)
            response = connection.getresponse()
            data = response.read(ANSWER_LIMIT_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            kind = RefusedError if isinstance(error, ConnectionRefusedError) else MachineError
            raise kind(f"{what} got no answer: {reason}") from error
        finally:
            connection.close()
        if len(data) > ANSWER_LIMIT_BYTES:
            raise MachineError(f"{what} was answered with more than {ANSWER_LIMIT_BYTES} bytes")
        return response.status, data


def _node(plain: Any) -> FoundNode:
    metadata = _object(plain, "metadata")
    labels = metadata.get("labels") or {}
    labels = labels if isinstance(labels, dict) else {}
    conditions = _object(plain, "status").get("conditions") or []
    ready = isinstance(conditions, list) and any(
        isinstance(each, dict) and each.get("type") == "Ready" and each.get("status") == "True"
        for each in conditions
    )
    node = _label(labels, NODE_LABEL, NODE_ID)
    release = _object(_object(plain, "status"), "nodeInfo").get("kubeletVersion")
    return FoundNode(
        node=KubeNode(
            name=_text(metadata, "name"),
            uid=_text(metadata, "uid"),
            node=NodeId(node) if node else None,
            hardware=_label(labels, HARDWARE_LABEL, MARK),
            server=ETCD_LABEL in labels,
            ready=ready,
            cordoned=_object(plain, "spec").get("unschedulable") is True,
            release=release if isinstance(release, str) and RELEASE.fullmatch(release) else None,
        ),
        version=_text(metadata, "resourceVersion"),
    )


def _label(labels: dict[str, Any], name: str, form: re.Pattern[str]) -> str | None:
    """A label that we set; what somebody else wrote there is none."""
    value = labels.get(name)
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _object(plain: Any, key: str) -> dict[str, Any]:
    """The object at ``key``, empty where there is none."""
    found = plain.get(key) if isinstance(plain, dict) else None
    return found if isinstance(found, dict) else {}


def _text(plain: dict[str, Any], key: str) -> str:
    value = plain.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 253:
        raise MachineError(f"the Kubernetes API answers with {key} {value!r:.80}, not a text")
    return value
