# SPDX-License-Identifier: Apache-2.0
"""As whom a running server is asked whether it is ready."""

import asyncio
from typing import Any

import aiohttp
import pytest

from k3sagentd.core.k3s import K3sState, ServerOrAgent
from k3sagentd.k3s import probe
from k3sagentd.k3s.probe import Passwords

CA = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


class Server:
    """Takes one password for ``node``."""

    def __init__(self, password: str, readyz: int = 200) -> None:
        self.password = password
        self.readyz = readyz
        self.tried: list[str] = []

    async def get(
        self, session: object, url: str, auth: aiohttp.BasicAuth | None = None
    ) -> tuple[int, bytes]:
        match url.removeprefix("https://127.0.0.1:6443"):
            case "/ping":
                return 200, b"pong"
            case "/cacerts":
                return 200, CA
            case "/v1-k3s/readyz":
                assert auth is not None
                assert auth.login == "node"
                self.tried.append(auth.password)
                return (self.readyz if auth.password == self.password else 401), b""
        raise AssertionError(url)


def look(server: Server, passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> K3sState:
    monkeypatch.setattr(probe, "_get", server.get)
    found: Any = asyncio.run(probe.probe(ServerOrAgent.SERVER, passwords))
    return found


def test_by_the_agent_token(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("agent")
    assert look(server, Passwords(["agent", "server"]), monkeypatch).ready
    assert server.tried == ["agent"]


def test_by_the_server_token_where_there_is_no_other_and_from_then_on_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, passwords = Server("server"), Passwords(["agent", "server"])
    assert look(server, passwords, monkeypatch).ready
    assert look(server, passwords, monkeypatch).ready
    assert server.tried == ["agent", "server", "server"]
    server.password = "agent"  # it was started again, with an agent token
    assert look(server, passwords, monkeypatch).ready


def test_no_other_password_is_tried_on_a_server_that_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server("agent", readyz=503)
    state = look(server, Passwords(["agent", "server"]), monkeypatch)
    assert state.detail == "its server is up but not ready (503)"
    assert server.tried == ["agent"]


def test_a_server_that_is_busy_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(Server("agent", readyz=429), Passwords(["agent"]), monkeypatch).ready


def test_a_server_that_takes_none_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not look(Server("other"), Passwords(["agent", "server"]), monkeypatch).ready
