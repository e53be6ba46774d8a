# SPDX-License-Identifier: Apache-2.0
"""The end that connects: one request, one answer, and in words why there was none."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.connector import Connection

from k3sagentd.core.words import NodeId
from k3sagentd.errors import K3sagentdError, PeerError
from k3sagentd.peer.sockets import watch_liveness
from k3sagentd.peer.tls import peer_node_id, why_refused

CONNECT_TIMEOUT_S = 5.0
ANSWER_LIMIT_BYTES = 1024 * 1024
IDLE_TIMEOUT_S = 60.0
CONNECTIONS_LIMIT = 2048


class PeerUnreachableError(K3sagentdError):
    """Nobody answers there, now."""


class PeerRefusedError(K3sagentdError):
    """Somebody answers who is no peer of ours, or does not take us for one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and who gave it."""

    peer: NodeId
    body: dict[str, Any]
    date: str | None = None
    """The peer's clock (RFC 9110, section 6.6.1)."""


class PeerClient:
    """Posts to peers over connections that are kept and used again."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._connector = aiohttp.TCPConnector(
            ssl=context,
            limit=CONNECTIONS_LIMIT,
            keepalive_timeout=IDLE_TIMEOUT_S,
            enable_cleanup_closed=False,
        )
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            response_class=_Response,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def post(
        self, address: str, port: int, path: str, body: dict[str, Any], timeout_s: float
    ) -> Reply:
        """Post ``body``; raises PeerUnreachableError, PeerRefusedError or PeerError (nonsense)."""
        host = f"[{address}]" if ":" in address else address
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.post(
                f"https://{host}:{port}{path}", json=body, timeout=timeout, allow_redirects=False
            ) as response:
                return await _reply(response)
        except aiohttp.ClientConnectorCertificateError as error:
            raise PeerRefusedError(why_refused(error.certificate_error)) from error
        except aiohttp.ClientConnectorSSLError as error:
            raise PeerRefusedError(_ssl_reason(error)) from error
        except TimeoutError as error:
            raise PeerUnreachableError("no answer in time") from error
        except aiohttp.ClientOSError as error:
            raise _broken(error) from error
        except aiohttp.ClientError as error:
            raise PeerUnreachableError(f"the connection broke ({type(error).__name__})") from error


class _Response(aiohttp.ClientResponse):
    """Remembers who is at the other end, which a response forgets with its last byte."""

    tls: ssl.SSLObject | None = None

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Before the answer is awaited: from here on the kernel watches the peer."""
        transport = connection.transport
        if transport is not None:
            self.tls = transport.get_extra_info("ssl_object")
            watch_liveness(transport.get_extra_info("socket"))
        return await super().start(connection)


def _ssl_reason(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__ or error
    return why_refused(cause)


def _broken(error: aiohttp.ClientOSError) -> K3sagentdError:
    """TLS 1.3: a server that does not take our certificate says so only after the handshake."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
            return PeerRefusedError(
                "it does not take this node's certificate: it has another token"
            )
        cause = cause.__cause__ or cause.__context__
    return PeerUnreachableError(error.strerror or "the connection broke")


async def _reply(response: aiohttp.ClientResponse) -> Reply:
    assert isinstance(response, _Response), "the session makes no other"
    peer = peer_node_id(response.tls)
    data = await response.content.read(ANSWER_LIMIT_BYTES + 1)
    while chunk := await response.content.read(ANSWER_LIMIT_BYTES + 1):
        data += chunk
        if len(data) > ANSWER_LIMIT_BYTES:
            raise PeerError(f"the answer is longer than {ANSWER_LIMIT_BYTES} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise PeerError("the answer is not JSON") from None
    if not isinstance(body, dict):
        raise PeerError("the answer is not a JSON object")
    if response.status != 200:
        reason = str(body.get("error", response.reason))[:200]
        raise PeerRefusedError(f"it refused this node: {reason}")
    return Reply(peer, body, response.headers.get("Date"))
