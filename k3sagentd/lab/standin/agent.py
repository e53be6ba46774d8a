# SPDX-License-Identifier: Apache-2.0
"""``k3s agent``: checks the CA, registers its Node, answers as the kubelet does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from aiohttp import web

from k3sagentd.lab.standin.client import ServerClient, ServerError
from k3sagentd.lab.standin.options import Knobs, Options, fatal, log, node_password

RETRY_S = 5.0
REFRESH_S = 60.0


class Agent:
    """One agent."""

    def __init__(self, options: Options, knobs: Knobs, data: Path) -> None:
        self._options = options
        self._knobs = knobs
        self._data = data / "agent"
        self._balancer = self._data / "etc/k3s-agent-load-balancer.json"

    async def run(self) -> None:
        """Join, then live; an agent retries for ever (K3S.md 8)."""
        if not self._options.server:
            fatal("--server is required")
        if not self._options.token:
            fatal("--token is required")
        (self._data / "etc").mkdir(parents=True, exist_ok=True)
        await asyncio.sleep(self._knobs.start_delay_s)
        joined = await self._join()
        while not joined:
            await asyncio.sleep(RETRY_S)
            joined = await self._join()
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 10248).start()
        while True:
            await asyncio.sleep(REFRESH_S)
            await self._join()

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

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
                if "Node password rejected" in str(error):
                    log.error("%s", error)
                log.info("failed to get CA certs or config: %s", error)
        return False

    async def _join_at(self, url: str) -> None:
        client = ServerClient(url, str(self._options.token), "node")
        certificate = await client.cacerts()
        await client.ask("GET", "/v1-k3s/config")
        servers = json.loads(await client.ask("GET", "/v1-k3s/apiservers"))
        node = {
            "name": self._options.node_name,
            "password": node_password(),
            "ip": self._options.node_ip,
        }
        await client.ask("PUT", "/v1-k3s/standin/node", node)
        (self._data / "server-ca.crt").write_bytes(certificate)
        (self._data / "client-kubelet.crt").write_bytes(certificate)
        balancer = {"ServerURL": self._options.server, "ServerAddresses": servers}
        self._balancer.write_text(json.dumps(balancer))


def main(options: Options, knobs: Knobs, data: Path) -> int:
    """Run for ever."""
    asyncio.run(Agent(options, knobs, data).run())
    return 0
