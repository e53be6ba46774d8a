# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API on :6443, as far as machines that come and go need it: Nodes and Leases.

Callers are told by their client certificate; there is no other way in, as in K3s.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from k3sagentd.lab.standin.etcd import EtcdError
from k3sagentd.lab.standin.nodes import BEATS, create_node
from k3sagentd.lab.standin.objects import LEASE, NODE, ApiError, Object, Objects
from k3sagentd.lab.standin.pki import MASTERS, NODES
from k3sagentd.lab.standin.store import Store

ADDRESSES = "/registry/masterleases/"
"""Each server that runs renews its address there; others forget it 15 s after its last word."""
MERGE = ("application/merge-patch+json", "application/strategic-merge-patch+json")
NODE_USER = "system:node:"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whom a client certificate names."""

    user: str
    groups: tuple[str, ...]

    @property
    def node(self) -> str | None:
        """The node whose kubelet this is."""
        if NODES in self.groups and self.user.startswith(NODE_USER):
            return self.user.removeprefix(NODE_USER)
        return None


def caller(request: web.Request) -> Caller | None:
    """Who asks; None for nobody known."""
    certificate = request.transport and request.transport.get_extra_info("peercert")
    if not certificate:
        return None
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    names = [value for key, value in subject if key == "commonName"]
    groups = tuple(value for key, value in subject if key == "organizationName")
    return Caller(user=names[0], groups=groups) if names else None


def failure(error: ApiError) -> web.Response:
    """A Status object."""
    return web.json_response(error.status(), status=error.code)


def is_api(path: str) -> bool:
    """Whether a path is the API server's, and not the supervisor's."""
    heads = ("/api", "/apis", "/version", "/readyz", "/livez", "/healthz", "/openapi", "/metrics")
    return any(path == head or path.startswith(head + "/") for head in heads)


async def addresses(store: Store) -> list[str]:
    """Of the servers that run."""
    found = (await store.list(ADDRESSES)).entries
    return [each.key.removeprefix(ADDRESSES) for each in found]


class Api:
    """The API server of one K3s server."""

    def __init__(self, store: Store, objects: Objects, version: str) -> None:
        self._store = store
        self._objects = objects
        self._version = version

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Take over its paths."""
        node = "/api/v1/nodes/{name}"
        leases = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        lease = leases + "/{name}"
        endpoints = "/api/v1/namespaces/default/endpoints/kubernetes"
        for method, path, handler in (
            ("GET", "/api/v1/nodes", self._nodes),
            ("POST", "/api/v1/nodes", self._create_node),
            ("GET", node, self._node),
            ("PATCH", node, self._patch_node),
            ("PATCH", node + "/status", self._patch_node),
            ("DELETE", node, self._delete_node),
            ("GET", leases, self._leases),
            ("POST", leases, self._create_lease),
            ("GET", lease, self._lease),
            ("PUT", lease, self._replace_lease),
            ("DELETE", lease, self._delete_lease),
            ("GET", endpoints, self._endpoints),
            ("GET", "/version", self._get_version),
        ):
            router.add_route(method, path, self._guarded(handler))
        for path in ("/readyz", "/livez", "/healthz"):
            router.add_get(path, self._guarded(self._ok))
        router.add_route("*", "/{rest:(api|apis)(/.*)?}", self._guarded(self._unknown))

    def _guarded(self, handler: Handler) -> Handler:
        """Who asks, whether they may, and errors as Status objects."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                who = caller(request)
                if who is None:
                    raise ApiError(401, "Unauthorized", "Unauthorized")
                if MASTERS not in who.groups:
                    await _authorize(request, who)
                return await handler(request)
            except ApiError as error:
                return failure(error)
            except EtcdError as error:
                return failure(ApiError(500, "InternalError", f"etcdserver: {error}"))

        return guarded

    # --- nodes ------------------------------------------------------------------------------

    async def _nodes(self, request: web.Request) -> web.Response:
        return web.json_response(await self._objects.list(NODE))

    async def _node(self, request: web.Request) -> web.Response:
        return web.json_response(await self._objects.get(NODE, request.match_info["name"]))

    async def _create_node(self, request: web.Request) -> web.Response:
        wanted = await _body(request)
        made = await create_node(self._objects, _name(wanted), wanted)
        return web.json_response(made, status=201)

    async def _patch_node(self, request: web.Request) -> web.Response:
        if request.content_type not in MERGE:
            why = (
                "the body of the request was in an unknown format - accepted media types include: "
            )
            raise ApiError(415, "UnsupportedMediaType", why + ", ".join(MERGE))
        patch = await _body(request)
        if request.path.endswith("/status"):
            patch = {key: patch[key] for key in ("status", "metadata") if key in patch}
        else:
            patch.pop("status", None)
        version = (patch.get("metadata") or {}).pop("resourceVersion", None)
        name = request.match_info["name"]
        changed = await self._objects.change(
            NODE, name, lambda node: merged(node, patch), version=version
        )
        return web.json_response(changed)

    async def _delete_node(self, request: web.Request) -> web.Response:
        options = await _body(request) if request.can_read_body else {}
        found, gone = await self._objects.delete(NODE, request.match_info["name"], options)
        return _deleted(found, gone)

    # --- leases -----------------------------------------------------------------------------

    async def _leases(self, request: web.Request) -> web.Response:
        namespace = f"{request.match_info['namespace']}/"
        return web.json_response(await self._objects.list(LEASE, namespace))

    async def _lease(self, request: web.Request) -> web.Response:
        return web.json_response(await self._objects.get(LEASE, _path(request)))

    async def _create_lease(self, request: web.Request) -> web.Response:
        wanted = await _body(request)
        key = f"{request.match_info['namespace']}/{_name(wanted)}"
        return web.json_response(await self._objects.create(LEASE, key, wanted), status=201)

    async def _replace_lease(self, request: web.Request) -> web.Response:
        wanted = await _body(request)
        return web.json_response(await self._objects.replace(LEASE, _path(request), wanted))

    async def _delete_lease(self, request: web.Request) -> web.Response:
        options = await _body(request) if request.can_read_body else {}
        return _deleted(*await self._objects.delete(LEASE, _path(request), options))

    # --- the rest ---------------------------------------------------------------------------

    async def _endpoints(self, request: web.Request) -> web.Response:
        found = [{"ip": each.rpartition(":")[0]} for each in await addresses(self._store)]
        ports = [{"name": "https", "port": 6443, "protocol": "TCP"}]
        body = {
            "kind": "Endpoints",
            "apiVersion": "v1",
            "metadata": {"name": "kubernetes", "namespace": "default"},
            "subsets": [{"addresses": found, "ports": ports}],
        }
        return web.json_response(body)

    async def _get_version(self, request: web.Request) -> web.Response:
        return web.json_response({"gitVersion": self._version})

    async def _ok(self, request: web.Request) -> web.Response:
        await self._store.get("/registry/health")
        return web.Response(text="ok")

    async def _unknown(self, request: web.Request) -> web.Response:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")


async def _authorize(request: web.Request, who: Caller) -> None:
    """A kubelet may look after its own Node and nothing else (the Node authorizer)."""
    path, method, own = request.path, request.method, who.node
    allowed = own is not None and (
        (method, path)
        in (
            ("GET", f"/api/v1/nodes/{own}"),
            ("PATCH", f"/api/v1/nodes/{own}/status"),
            ("GET", "/api/v1/namespaces/default/endpoints/kubernetes"),
            ("GET", "/readyz"),
        )
        or path == f"/apis/coordination.k8s.io/v1/namespaces/{BEATS}/leases/{own}"
        or (
            method == "POST"
            and path in ("/api/v1/nodes", f"/apis/coordination.k8s.io/v1/namespaces/{BEATS}/leases")
            and _name(await _body(request)) == own
        )
    )
    if not allowed:
        why = f'User "{who.user}" cannot {method.lower()} {path}'
        raise ApiError(403, "Forbidden", f"forbidden: {why}")


def _deleted(found: Object, gone: bool) -> web.Response:
    if not gone:
        return web.json_response(found)
    details = {"name": found["metadata"]["name"], "uid": found["metadata"]["uid"]}
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    return web.json_response(status | {"details": details})


def _path(request: web.Request) -> str:
    return f"{request.match_info['namespace']}/{request.match_info['name']}"


async def _body(request: web.Request) -> Object:
    try:
        found: Any = json.loads(await request.read())
    except ValueError as error:
        raise ApiError(400, "BadRequest", f"the body is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("metadata", {}), dict):
        raise ApiError(400, "BadRequest", "the body is not an object")
    return found


def _name(wanted: Object) -> str:
    name = (wanted.get("metadata") or {}).get("name")
    if not isinstance(name, str) or not name:
        raise ApiError(422, "Invalid", "metadata.name: Required value: name or generateName")
    return name


def merged(value: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for key, each in patch.items():
        if each is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), each)
    return result
