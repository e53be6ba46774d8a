# SPDX-License-Identifier: Apache-2.0
"""``k3s agent``: checks the CA, gets its kubelet's certificate, registers and keeps its Node."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from pathlib import Path
from typing import Any

from aiohttp import web

from k3sagentd.files import write_atomically
from k3sagentd.lab.standin import nodes, pki
from k3sagentd.lab.standin.client import ServerClient, ServerError, request
from k3sagentd.lab.standin.options import Knobs, Options, fatal, log, node_password

RETRY_S = 5.0
"""Between attempts to join, and up to as much again by chance (pkg/agent/config, JitterUntil)."""
KUBELET_PORT = 10248
REJECTED = (
    "Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may "
    "not match server node-passwd entry, try enabling a unique node name with the "
    "--with-node-id flag"
)
KEY_MARK = b"-----BEGIN PRIVATE KEY-----"


class Agent:
    """One agent."""

    def __init__(self, options: Options, knobs: Knobs, data: Path) -> None:
        self._options = options
        self._knobs = knobs
        self._data = data / "agent"
        self._balancer = self._data / "etc/k3s-agent-load-balancer.json"
        self._name = options.node_name
        self._context: ssl.SSLContext | None = None

    async def run(self) -> None:
        """Join, then live; an agent retries for ever (K3S.md 8)."""
        if not self._options.server:
            fatal("--server is required")
        if not self._options.token:
            fatal("--token is required")
        self._options.labels  # noqa: B018 (bad ones end it before it has joined)
        (self._data / "etc").mkdir(parents=True, exist_ok=True)
        await asyncio.sleep(self._knobs.start_delay_s)
        joined = await self._join()
        while not joined:
            await asyncio.sleep(RETRY_S * (1 + random.random()))  # noqa: S311 (no secret)
            joined = await self._join()
        await serve_kubelet()
        self._context = pki.client_context(
            self._data / "server-ca.crt",
            self._data / "client-kubelet.crt",
            self._data / "client-kubelet.key",
        )
        pause_s = min(nodes.BEAT_S, self._knobs.node_grace_s / 4)
        registered, said = False, ""
        while True:
            try:
                if not registered:
                    await self._register()
                    registered = True
                await self._beat()
                said = ""
            except ServerError as error:
                if str(error) != said:
                    log.error("Unable to update node status: %s", error)
                said = str(error)
            await asyncio.sleep(pause_s if registered else 1.0)

    # --- joining ----------------------------------------------------------------------------

    def _servers(self) -> list[str]:
        """The server that it was given, and those that it knows for that one."""
        server = str(self._options.server)
        try:
            known = json.loads(self._balancer.read_text())
        except (OSError, ValueError):
            return [server]
        if known["ServerURL"] != server:
            return [server]
        return list(dict.fromkeys([server, *(f"https://{a}" for a in known["ServerAddresses"])]))

    async def _join(self) -> bool:
        for url in self._servers():
            try:
                await self._join_at(url)
                return True
            except ServerError as error:
                log.info("Waiting to retrieve agent configuration; server is not ready: %s", error)
        return False

    async def _join_at(self, url: str) -> None:
        client = ServerClient(url, str(self._options.token), "node")
        ca = await client.cacerts()
        await client.ask("GET", "/v1-k3s/config")
        client_ca = await client.ask("GET", "/v1-k3s/client-ca.crt")
        headers = {"k3s-Node-Name": self._name, "k3s-Node-Password": node_password()}
        try:
            pem = await client.ask("GET", "/v1-k3s/client-kubelet.crt", headers=headers)
        except ServerError as error:
            if error.status != 403:
                raise
            raise ServerError(403, REJECTED) from error
        servers = json.loads(await client.ask("GET", "/v1-k3s/apiservers"))
        write_kubelet(self._data, ca, client_ca, pem)
        self._remember(servers)

    def _remember(self, servers: list[str]) -> None:
        balancer = {"ServerURL": self._options.server, "ServerAddresses": servers}
        text = json.dumps(balancer, indent=1)
        if servers and (not self._balancer.exists() or self._balancer.read_text() != text):
            write_atomically(self._balancer, text.encode(), mode=0o600)

    # --- living -----------------------------------------------------------------------------

    async def _register(self) -> None:
        """As a kubelet: make the Node; of one that is there only its status is renewed."""
        wanted = nodes.new_node(self._options, self._knobs.version)
        status, _ = await self._api("POST", "/api/v1/nodes", wanted, (201, 409))
        if status == 409:
            await self._well()

    async def _well(self) -> None:
        body = {"status": nodes.status(self._options, self._knobs.version)}
        await self._api("PATCH", f"/api/v1/nodes/{self._name}/status", body, (200,))

    async def _beat(self) -> None:
        """Renew the Node; one that was deleted stays away until the next start."""
        _, node = await self._api("GET", f"/api/v1/nodes/{self._name}", None, (200,))
        leases = f"/apis/coordination.k8s.io/v1/namespaces/{nodes.BEATS}/leases"
        status, found = await self._api("GET", f"{leases}/{self._name}", None, (200, 404))
        renewed = nodes.beat(self._name)
        if status == 404:
            await self._api("POST", leases, renewed, (201,))
        else:
            renewed["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
            await self._api("PUT", f"{leases}/{self._name}", renewed, (200,))
        if nodes.readiness(node) != "True":
            await self._well()
        path = "/api/v1/namespaces/default/endpoints/kubernetes"
        _, endpoints = await self._api("GET", path, None, (200,))
        found = endpoints["subsets"][0]["addresses"]
        self._remember([f"{each['ip']}:6443" for each in found])

    async def _api(
        self, method: str, path: str, body: Any, allowed: tuple[int, ...]
    ) -> tuple[int, Any]:
        """Ask the first server that answers; raises ServerError for what is not allowed."""
        assert self._context is not None, "it has joined"
        headers = {"Content-Type": "application/merge-patch+json"} if method == "PATCH" else None
        reasons = []
        for url in self._servers():
            try:
                status, answer = await request(
                    method, url + path, self._context, body=body, headers=headers
                )
            except ServerError as error:
                reasons.append(str(error))
                continue
            if status in allowed:
                return status, json.loads(answer)
            text = answer[:200].decode(errors="replace")
            reasons.append(f"{url}{path}: {status} {text}")
            if status < 500:
                break
        raise ServerError(0, "; ".join(reasons))


def write_kubelet(data: Path, ca: bytes, client_ca: bytes, pem: bytes) -> None:
    """The files of a kubelet that has joined."""
    data.mkdir(parents=True, exist_ok=True)
    start = pem.index(KEY_MARK)
    write_atomically(data / "server-ca.crt", ca)
    write_atomically(data / "client-ca.crt", client_ca)
    write_atomically(data / "client-kubelet.key", pem[start:], mode=0o600)
    write_atomically(data / "client-kubelet.crt", pem[:start])


async def serve_kubelet() -> None:
    """Answer on 10248 from now on, whatever becomes of the servers."""

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", KUBELET_PORT).start()


def main(options: Options, knobs: Knobs, data: Path) -> int:
    """Run for ever."""
    asyncio.run(Agent(options, knobs, data).run())
    return 0
