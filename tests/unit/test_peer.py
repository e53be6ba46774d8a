# SPDX-License-Identifier: Apache-2.0
"""The peer API on loopback: who is let in, who is refused, and with which words."""

import asyncio
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from k3sagentd.errors import PeerError
from k3sagentd.hardware import Hardware
from k3sagentd.identity import Identity, load_or_create
from k3sagentd.keys import SiteKeys, derive
from k3sagentd.peer.client import PeerClient, PeerRefusedError, PeerUnreachableError
from k3sagentd.peer.server import BODY_LIMIT_BYTES, PeerServer
from k3sagentd.peer.tls import client_context, server_context

OURS, THEIRS = derive(secrets.token_bytes(32)), derive(secrets.token_bytes(32))


class Echo:
    """Answers with who asked."""

    async def watch(self, peer: str, address: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"peer": peer, "address": address, "got": body.get("text")}

    async def exchange(self, peer: str, address: str, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("text") == "slow":
            await asyncio.sleep(60)
        raise PeerError("nonsense")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Pair:
    """A server and the means to call it; of several keys, the first are shown."""

    def __init__(self, tmp_path: Path, server: list[SiteKeys], client: list[SiteKeys]) -> None:
        self.server_is = load_or_create(tmp_path / "server", server[0], Hardware())
        self.client_is: Identity = load_or_create(tmp_path / "client", client[0], Hardware())
        self.refused: list[tuple[str, str]] = []
        self.port = free_port()
        self._server_takes = [each.ca_certificate for each in server]
        self._client_takes = [each.ca_certificate for each in client]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PeerClient]:
        server = PeerServer(
            server_context(self._server_takes, self.server_is),
            self.port,
            Echo(),
            lambda address, reason: self.refused.append((address, reason)),
        )
        client = PeerClient(client_context(self._client_takes, self.client_is))
        await server.start()
        try:
            yield client
        finally:
            await client.close()
            await server.stop()

    async def ask(self, client: PeerClient, path: str = "/v1/watch", **body: Any) -> dict[str, Any]:
        body = {"version": 1, **body}
        reply = await client.post("127.0.0.1", self.port, path, body, 5)
        assert reply.peer == self.server_is.node
        return reply.body


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path, [OURS], [OURS])


def run(pair: Pair, **kwargs: Any) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with pair.running() as client:
            return await pair.ask(client, **kwargs)

    return asyncio.run(main())


def test_both_ends_know_each_other(pair: Pair) -> None:
    answer = run(pair, text="x")
    assert answer == {"peer": pair.client_is.node, "address": "127.0.0.1", "got": "x"}
    assert not pair.refused


def test_another_token_is_refused_on_both_sides(tmp_path: Path) -> None:
    pair = Pair(tmp_path, [OURS], [THEIRS])

    async def main() -> None:
        async with pair.running() as client:
            with pytest.raises(PeerRefusedError, match="another token"):
                await pair.ask(client)
            async with asyncio.timeout(5):
                while not pair.refused:
                    await asyncio.sleep(0.01)

    asyncio.run(main())
    assert [address for address, _ in pair.refused] == ["127.0.0.1"]
    assert "another token" in pair.refused[0][1]


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ([OURS, THEIRS], [OURS]),  # one has the next token already
        ([OURS, THEIRS], [THEIRS, OURS]),  # one shows it
        ([THEIRS, OURS], [OURS, THEIRS]),
        ([THEIRS, OURS], [THEIRS]),  # one has forgotten the old one
    ],
)
def test_during_a_rotation_both_tokens_are_taken(
    tmp_path: Path, server: list[SiteKeys], client: list[SiteKeys]
) -> None:
    pair = Pair(tmp_path, server, client)
    assert run(pair, text="x")["got"] == "x"
    assert not pair.refused


def test_who_missed_the_next_token_is_refused_with_a_reason(tmp_path: Path) -> None:
    pair = Pair(tmp_path, [THEIRS, OURS], [OURS])
    with pytest.raises(PeerRefusedError, match="another token"):
        run(pair)


def test_another_version_is_refused_and_both_are_told(pair: Pair) -> None:
    with pytest.raises(PeerRefusedError, match="protocol version 1 here, 2 there"):
        run(pair, version=2)
    assert pair.refused == [("127.0.0.1", "protocol version 1 here, 2 there")]


def test_too_long_a_body_is_refused(pair: Pair) -> None:
    with pytest.raises(PeerRefusedError, match=f"more than {BODY_LIMIT_BYTES} bytes"):
        run(pair, text="x" * BODY_LIMIT_BYTES)


def test_nonsense_is_refused(pair: Pair) -> None:
    with pytest.raises(PeerRefusedError, match="nonsense"):
        run(pair, path="/v1/exchange")


def test_nobody_there(pair: Pair) -> None:
    async def main() -> None:
        client = PeerClient(client_context([OURS.ca_certificate], pair.client_is))
        try:
            with pytest.raises(PeerUnreachableError):
                await pair.ask(client)
        finally:
            await client.close()

    asyncio.run(main())


def test_garbage_instead_of_tls_is_refused_with_a_reason(pair: Pair) -> None:
    async def main() -> None:
        async with pair.running():
            reader, writer = await asyncio.open_connection("127.0.0.1", pair.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
            await reader.read()
            writer.close()

    asyncio.run(main())
    assert [address for address, _ in pair.refused] == ["127.0.0.1"]


def test_a_client_without_a_certificate_learns_nothing(pair: Pair) -> None:
    async def main() -> bytes:
        async with pair.running():
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            reader, writer = await asyncio.open_connection("127.0.0.1", pair.port, ssl=context)
            writer.write(b"POST /v1/watch HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
            try:
                return await reader.read()
            except (ssl.SSLError, ConnectionError):
                return b""
            finally:
                writer.close()

    assert asyncio.run(main()) == b""
    assert len(pair.refused) == 1


HANDSHAKE = """
import asyncio, datetime, sys, time
from pathlib import Path
from tests.unit.test_peer import Pair, derive, run
assert datetime.datetime.now(datetime.UTC).year == int(sys.argv[2]), "the clock is not set"
keys = derive(b"k" * 32)
pair = Pair(Path(sys.argv[1]), [keys], [keys])
assert run(pair, text="x")["got"] == "x"
print("shook hands")
"""


@pytest.mark.parametrize("year", [1970, 2099])
def test_a_handshake_does_not_depend_on_the_clock(tmp_path: Path, year: int) -> None:
    assert shutil.which("faketime"), "the package faketime is missing: make test installs it"
    done = subprocess.run(
        [
            "faketime",
            "-f",
            f"@{year}-06-01 00:00:00",
            sys.executable,
            "-c",
            HANDSHAKE,
            str(tmp_path),
            str(year),
        ],
        env={**os.environ, "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "shook hands\n", done.stderr
