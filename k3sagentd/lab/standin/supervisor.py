# SPDX-License-Identifier: Apache-2.0
"""The supervisor's paths on :6443: what joining machines ask, and who may (K3S.md 2 and 3)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import BasicAuth, web

from k3sagentd.lab.standin import pki
from k3sagentd.lab.standin.api import Handler, addresses, caller, failure, is_api
from k3sagentd.lab.standin.etcd import EtcdError
from k3sagentd.lab.standin.members import DuplicateNameError, Members
from k3sagentd.lab.standin.nodes import check_password
from k3sagentd.lab.standin.objects import ApiError
from k3sagentd.lab.standin.options import Knobs, Options
from k3sagentd.lab.standin.store import Store
from k3sagentd.lab.standin.tokens import Tokens

SERVER_PATHS = ("/v1-k3s/server-bootstrap", "/v1-k3s/token", "/v1-k3s/standin/member")
OPEN_PATHS = ("/ping", "/cacerts")


class Supervisor:
    """The supervisor of one server; ``members`` is None without etcd."""

    def __init__(
        self,
        data: Path,
        options: Options,
        knobs: Knobs,
        tokens: Tokens,
        store: Store,
        members: Members | None,
    ) -> None:
        self._tls = data / "tls"
        self._options = options
        self._knobs = knobs
        self._tokens = tokens
        self._store = store
        self._members = members
        self._running = {"reads": 0, "writes": 0}
        self.started = False
        """Before, every path answers ``starting``."""
        self.ready = False

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Take over its paths."""
        router.add_get("/ping", self._ping)
        router.add_get("/cacerts", self._cacerts)
        router.add_get("/v1-k3s/readyz", self._readyz)
        router.add_get("/v1-k3s/apiservers", self._apiservers)
        router.add_get("/v1-k3s/config", self._config)
        router.add_get("/v1-k3s/client-kubelet.crt", self._client_kubelet)
        router.add_get("/v1-k3s/client-ca.crt", self._client_ca)
        router.add_get("/v1-k3s/server-ca.crt", self._cacerts)
        router.add_get("/v1-k3s/server-bootstrap", self._bootstrap)
        router.add_put("/v1-k3s/token", self._token)
        router.add_post("/v1-k3s/standin/member", self._member)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """``starting`` until it is up; then who may ask what."""
        if not self.started:
            return web.Response(status=503, text="starting")
        if is_api(request.path) or request.path in OPEN_PATHS:
            return await handler(request)
        refused = self._refused(request)
        if refused is not None:
            return refused
        try:
            if request.path in SERVER_PATHS:
                return await handler(request)
            return await self._limited(request, handler)
        except EtcdError as error:
            return web.Response(status=500, text=str(error))

    def _refused(self, request: web.Request) -> web.Response | None:
        try:
            auth = BasicAuth.decode(request.headers.get("Authorization", ""))
        except ValueError:
            who = caller(request)
            if who is None:
                return failure(ApiError(401, "Unauthorized", "not authorized"))
            return failure(ApiError(403, "Forbidden", "forbidden"))
        if not self._tokens.user(auth.login, auth.password):
            return failure(ApiError(401, "Unauthorized", "not authorized"))
        if auth.login != ("server" if request.path in SERVER_PATHS else "node"):
            return failure(ApiError(403, "Forbidden", "forbidden"))
        return None

    async def _limited(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Beyond so many at a time: later (k8s.io/apiserver, maxinflight.go)."""
        reading = request.method in ("GET", "HEAD")
        reads = self._knobs.reads
        kind, limit = ("reads", reads) if reading else ("writes", reads // 2)
        if self._running[kind] >= limit:
            text = "Too many requests, please try again later."
            return web.Response(status=429, text=text, headers={"Retry-After": "1"})
        self._running[kind] += 1
        try:
            await asyncio.sleep(self._knobs.request_s)
            return await handler(request)
        finally:
            self._running[kind] -= 1

    # --- for everybody, and for nodes -------------------------------------------------------

    async def _ping(self, request: web.Request) -> web.Response:
        return web.Response(text="pong")

    async def _cacerts(self, request: web.Request) -> web.Response:
        return web.Response(body=(self._tls / "server-ca.crt").read_bytes())

    async def _client_ca(self, request: web.Request) -> web.Response:
        return web.Response(body=(self._tls / "client-ca.crt").read_bytes())

    async def _readyz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok") if self.ready else web.Response(status=503)

    async def _apiservers(self, request: web.Request) -> web.Response:
        return web.json_response(await addresses(self._store))

    async def _config(self, request: web.Request) -> web.Response:
        return web.json_response({"critical": self._options.critical})

    async def _client_kubelet(self, request: web.Request) -> web.Response:
        """A kubelet's certificate and key, for whom the node's name belongs to."""
        name = request.headers.get("k3s-Node-Name", "").lower()
        password = request.headers.get("k3s-Node-Password", "")
        if not name or not password:
            return failure(ApiError(400, "BadRequest", "node name or password not set"))
        if not await check_password(self._store, name, password):
            why = f"unable to verify hash for node '{name}': hash does not match"
            return failure(ApiError(403, "Forbidden", why))
        certificate, key = pki.client_certificate(self._tls, f"system:node:{name}", pki.NODES)
        return web.Response(body=certificate + key)

    # --- for servers ------------------------------------------------------------------------

    async def _bootstrap(self, request: web.Request) -> web.Response:
        if self._members is None:
            return failure(ApiError(400, "BadRequest", "etcd disabled"))
        return web.Response(body=pki.export(self._tls))

    async def _token(self, request: web.Request) -> web.Response:
        wanted: dict[str, Any] = await request.json()
        await self._tokens.rotate(self._store, str(wanted.get("newToken") or ""))
        return web.Response()

    async def _member(self, request: web.Request) -> web.Response:
        """In K3s the joining server speaks to etcd itself; the rules are the same."""
        if self._members is None:
            return failure(ApiError(400, "BadRequest", "etcd disabled"))
        wanted: dict[str, Any] = await request.json()
        try:
            cluster = await self._members.add(wanted["node"], wanted["name"], wanted["peer_url"])
        except DuplicateNameError:
            return web.Response(status=409, text="duplicate node name found")
        return web.json_response({"cluster": cluster})
