# SPDX-License-Identifier: Apache-2.0
"""As whom a running server is asked whether it is ready, and who is not asked at all."""

import asyncio
import base64
import ssl
from pathlib import Path

import pytest
from aiohttp import web

from k3sagentd.core.k3s import K3sState, ServerOrAgent
from k3sagentd.k3s import probe
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.probe import Passwords
from tests.unit.fake_api import Authority

LOCAL = "127.0.0.1"


class Server:
    """Takes one password for ``node``; shows ``cacerts``, and has a certificate by ``signer``."""

    def __init__(self, directory: Path, password: str, readyz: int = 200) -> None:
        self.password, self.readyz = password, readyz
        self.tried: list[str] = []
        self.authority = self.signer = Authority("server-ca")
        self._directory = directory
        self._passwords: Passwords | None = None

    def looked_at(
        self,
        *passwords: str,
        ca_hash: str | None = None,
        role: ServerOrAgent = ServerOrAgent.SERVER,
    ) -> K3sState:
        """What a probe finds; without passwords one that has looked before looks again."""
        if passwords:
            self._passwords = Passwords(passwords)
        assert self._passwords is not None
        return asyncio.run(self._looked_at(self._passwords, ca_hash, role))

    async def _looked_at(
        self, passwords: Passwords, ca_hash: str | None, role: ServerOrAgent
    ) -> K3sState:
        chain = self._directory / "serving.pem"
        chain.write_bytes(b"".join(self.signer.leaf("k3s", (LOCAL,))))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, LOCAL, 0, ssl_context=context)
        await site.start()
        try:
            with pytest.MonkeyPatch.context() as patch:
                port = runner.addresses[0][1]
                patch.setattr(probe, "SERVER", f"https://{LOCAL}:{port}")
                kubelet = web.TCPSite(runner, LOCAL, 0)
                await kubelet.start()
                port = runner.addresses[1][1]
                patch.setattr(probe, "KUBELET", f"http://{LOCAL}:{port}/healthz")
                return await probe.probe(role, passwords, ca_hash)
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        match request.path:
            case "/ping":
                return web.Response(text="pong")
            case "/healthz":
                return web.Response(text="ok")
            case "/cacerts":
                return web.Response(body=self.authority.pem)
            case "/v1-k3s/readyz":
                kind, said = request.headers["Authorization"].split()
                assert kind == "Basic"
                user, password = base64.b64decode(said).decode().split(":")
                assert user == "node"
                self.tried.append(password)
                return web.Response(status=self.readyz if password == self.password else 401)
        raise web.HTTPNotFound


def test_by_the_agent_token(tmp_path: Path) -> None:
    server = Server(tmp_path, "agent")
    state = server.looked_at("agent", "server")
    assert (state.ready, state.ca_hash) == (True, hash_of_cacerts(server.authority.pem))
    assert server.tried == ["agent"]


def test_by_the_server_token_where_there_is_no_other_and_from_then_on_at_once(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, "server")
    assert server.looked_at("agent", "server").ready
    assert server.looked_at().ready
    assert server.tried == ["agent", "server", "server"]
    server.password = "agent"  # it was started again, with an agent token
    assert server.looked_at().ready


def test_no_other_password_is_tried_on_a_server_that_is_not_ready(tmp_path: Path) -> None:
    server = Server(tmp_path, "agent", readyz=503)
    state = server.looked_at("agent", "server")
    assert state.detail == "its server is up but not ready (503)"
    assert server.tried == ["agent"]


def test_a_server_that_is_busy_is_ready(tmp_path: Path) -> None:
    assert Server(tmp_path, "agent", readyz=429).looked_at("agent").ready


def test_a_server_that_takes_none_is_not_ready(tmp_path: Path) -> None:
    assert not Server(tmp_path, "other").looked_at("agent", "server").ready


def test_no_password_goes_to_another_cluster(tmp_path: Path) -> None:
    server = Server(tmp_path, "agent")
    wanted = hash_of_cacerts(server.authority.pem)
    assert server.looked_at("agent", ca_hash=wanted).ready
    server.authority = server.signer = Authority("another")
    state = server.looked_at("agent", ca_hash=wanted)
    assert (state.running, state.ready) == (True, False)
    assert state.detail == "its server has another CA"
    assert server.tried == ["agent"]


def test_no_password_goes_to_who_only_shows_the_clusters_ca(tmp_path: Path) -> None:
    """Anybody on the machine may listen there before K3s does, and may know ``/cacerts``."""
    server = Server(tmp_path, "agent")
    server.signer = Authority("somebody")
    state = server.looked_at("agent", ca_hash=hash_of_cacerts(server.authority.pem))
    assert not state.ready
    assert "certificate" in state.detail
    assert server.tried == []


def test_an_agent_that_is_a_server_is_seen(tmp_path: Path) -> None:
    """It was told to join as a server before the roster changed, and stayed in etcd unlisted."""
    server, agent = Server(tmp_path, "x"), ServerOrAgent.AGENT
    ca_hash = hash_of_cacerts(server.authority.pem)
    state = server.looked_at("x", ca_hash=ca_hash, role=agent)
    assert (state.ready, state.ca_hash) == (True, ca_hash)
    # What somebody else runs at that port is none of ours.
    assert server.looked_at("x", ca_hash="0" * 64, role=agent).ca_hash is None
    assert server.tried == []
