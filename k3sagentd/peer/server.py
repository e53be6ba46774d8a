# SPDX-License-Identifier: Apache-2.0
"""The end that listens: who may knock, how much, how long; then it asks a handler.

Accepting is done here rather than by the web server, so that a handshake that fails has an
address and a reason, and so that what strangers can open is bounded before any of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

from k3sagentd.core.words import NodeId
from k3sagentd.errors import MachineError, PeerError
from k3sagentd.peer.sockets import watch_liveness
from k3sagentd.peer.tls import peer_node_id, why_refused
from k3sagentd.peer.wire import PROTOCOL_VERSION

log = logging.getLogger(__name__)

CONNECTIONS_LIMIT = 1024
CONNECTIONS_PER_ADDRESS_LIMIT = 16
HANDSHAKES_LIMIT = 64
"""Handshakes at a time: what a stranger can keep busy."""
HANDSHAKE_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 10.0
BODY_LIMIT_BYTES = 256 * 1024
IDLE_TIMEOUT_S = 330.0
"""Longer than the longest watch, so that its connection is used again."""
BACKLOG = 128

Refused = Callable[[str, str], None]


class Handler(Protocol):
    """What answers the two requests of the peer API; raises PeerError for nonsense."""

    async def watch(self, peer: NodeId, address: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer when there is something new to tell."""

    async def exchange(self, peer: NodeId, address: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take messages in and answer with those that they cause."""


class PeerServer:
    """Serves the peer API on one port of all addresses."""

    def __init__(
        self, context: ssl.SSLContext, port: int, handler: Handler, on_refused: Refused
    ) -> None:
        self._context = context
        self._port = port
        self._handler = handler
        self._on_refused = on_refused
        self._transports: dict[asyncio.Transport, str] = {}
        self._handshakes: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        app = web.Application(client_max_size=BODY_LIMIT_BYTES)
        app.router.add_post("/v1/watch", self._watch)
        app.router.add_post("/v1/exchange", self._exchange)
        self._runner = web.AppRunner(
            app, handle_signals=False, access_log=None, keepalive_timeout=IDLE_TIMEOUT_S
        )

    async def start(self) -> None:
        """Listen; raises MachineError where the port is taken."""
        await self._runner.setup()
        sockets = _listen(self._port)
        self._tasks = [asyncio.create_task(self._accept(each)) for each in sockets]

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        for task in [*self._tasks, *self._handshakes]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._handshakes, return_exceptions=True)
        for transport in list(self._transports):
            transport.abort()
        await self._runner.cleanup()

    # --- connections ------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, name = await loop.sock_accept(listener)
                except OSError as error:  # EMFILE and the like: wait for better times
                    log.warning("cannot accept a connection: %s", error.strerror)
                    await asyncio.sleep(1.0)
                    continue
                address = plain_address(name[0])
                if self._too_many(address):
                    sock.close()
                    continue
                task = asyncio.create_task(self._handshake(sock, address))
                self._handshakes.add(task)
                task.add_done_callback(self._handshakes.discard)
        finally:
            listener.close()

    def _too_many(self, address: str) -> bool:
        for transport in [each for each in self._transports if each.is_closing()]:
            del self._transports[transport]
        mine = Counter(self._transports.values())[address]
        return (
            len(self._handshakes) >= HANDSHAKES_LIMIT
            or len(self._transports) >= CONNECTIONS_LIMIT
            or mine >= CONNECTIONS_PER_ADDRESS_LIMIT
        )

    async def _handshake(self, sock: socket.socket, address: str) -> None:
        watch_liveness(sock)
        assert self._runner.server is not None, "started before it accepts"
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                self._runner.server,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except ssl.SSLError as error:
            self._on_refused(address, why_refused(error))
        except OSError:
            # Who does not trust our certificate goes without a word: asyncio sends no alert.
            self._on_refused(address, "it broke off the TLS handshake; mostly it has another token")
        else:
            self._transports[transport] = address

    # --- requests ---------------------------------------------------------------------------

    async def _watch(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._handler.watch)

    async def _exchange(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._handler.exchange)

    async def _answer(self, request: web.Request, handle: Any) -> web.Response:
        address = plain_address(request.remote or "")
        try:
            if request.transport is None:
                raise PeerError("the connection is gone")
            peer = peer_node_id(request.transport.get_extra_info("ssl_object"))
            body = await _body(request)
            found = body.get("version")
            if found != PROTOCOL_VERSION:
                text = f"protocol version {PROTOCOL_VERSION} here, {found!r:.20} there"
                self._on_refused(address, text)
                return web.json_response({"error": text}, status=426)
            return web.json_response(await handle(peer, address, body))
        except PeerError as error:
            self._on_refused(address, f"it sent what no peer sends: {error}")
            return web.json_response({"error": str(error)}, status=400)


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            data = await request.read()
        body = json.loads(data)
    except TimeoutError:
        raise PeerError(f"its request took longer than {READ_TIMEOUT_S:.0f} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise PeerError(f"more than {BODY_LIMIT_BYTES} bytes") from None
    except (ValueError, RecursionError):
        raise PeerError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise PeerError("the body is not a JSON object")
    return body


def plain_address(address: str) -> str:
    """An IPv4 address that came in over IPv6, as what it is."""
    return address.removeprefix("::ffff:")


def _listen(port: int) -> list[socket.socket]:
    """One socket for both families where the kernel has IPv6, else IPv4 alone."""
    families = [socket.AF_INET6, socket.AF_INET] if socket.has_dualstack_ipv6() else []
    for family in families or [socket.AF_INET]:
        dual = family == socket.AF_INET6
        try:
            sock = socket.create_server(
                ("", port), family=family, backlog=BACKLOG, dualstack_ipv6=dual
            )
        except OSError as error:
            if dual:
                continue
            raise MachineError(f"port {port}/tcp cannot be used: {error.strerror}") from error
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [sock]
    raise MachineError(f"port {port}/tcp cannot be used: it is taken by another program")
