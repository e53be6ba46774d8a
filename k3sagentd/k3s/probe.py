# SPDX-License-Identifier: Apache-2.0
"""Is this machine's K3s ready? Asked at its own ports, as anybody may (K3S.md 3)."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator

import aiohttp

from k3sagentd.core.k3s import K3sState, ServerOrAgent
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.trust import insecure, trusting

SERVER = "https://127.0.0.1:6443"
KUBELET = "http://127.0.0.1:10248/healthz"
TIMEOUT_S = 5.0
BODY_LIMIT_BYTES = 256 * 1024
READY = (200, 404, 429)
"""Older releases have no readyz; then pong is all there is. And one that has no time to answer
(K3S.md 3) is busy with those that join it: nobody is sent to a server that is not ready."""


class Passwords:
    """What K3s may take for its user ``node``, the one that it took last first.

    The agent token, or the server token where the cluster runs without one; in a rotation of the
    site's token, those of the other tokens too.
    """

    def __init__(self, passwords: Iterable[str]) -> None:
        self._passwords = list(passwords)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._passwords))

    def took(self, password: str) -> None:
        """Begin with it the next time: K3s writes a line for each that it refuses."""
        self._passwords.remove(password)
        self._passwords.insert(0, password)


async def probe(role: ServerOrAgent, passwords: Passwords, ca_hash: str | None) -> K3sState:
    """Look once; never raises for a K3s that does not answer.

    No password goes to who has not the CA of ``ca_hash``; None: the cluster is not known yet.
    """
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        if role is ServerOrAgent.AGENT:
            return await _agent(session, ca_hash)
        return await _server(session, passwords, ca_hash)


async def _agent(session: aiohttp.ClientSession, wanted: str | None) -> K3sState:
    status, body = await _get(session, KUBELET)
    if status == 0:
        return K3sState(detail=f"the kubelet does not answer ({body.decode()})")
    ready = status == 200
    # What should be an agent may be a server, told to join before it was to be one.
    found, body = await _get(session, f"{SERVER}/cacerts")
    serves = found == 200 and wanted is not None and hash_of_cacerts(body) == wanted
    ca_hash = wanted if serves else None
    return K3sState(
        running=True, ready=ready, ca_hash=ca_hash, detail=f"the kubelet answers {status}"
    )


async def _server(
    session: aiohttp.ClientSession, passwords: Passwords, wanted: str | None
) -> K3sState:
    status, body = await _get(session, f"{SERVER}/ping")
    if status == 0:
        return K3sState(detail=f"its server does not answer ({body.decode()})")
    if status != 200:
        return K3sState(running=True, detail=f"its server says {body[:40].decode('ascii', '?')!r}")
    status, body = await _get(session, f"{SERVER}/cacerts")
    ca_hash = hash_of_cacerts(body) if status == 200 else None
    if ca_hash is None:
        return K3sState(running=True, detail="its server has no CA certificate yet")
    if wanted not in (None, ca_hash):
        return K3sState(running=True, ca_hash=ca_hash, detail="its server has another CA")
    status, said = await _readyz(session, passwords, body)
    ready = status in READY
    why = str(status) if status else said.decode()
    detail = "ready" if ready else f"its server is up but not ready ({why})"
    return K3sState(running=True, ready=ready, ca_hash=ca_hash, detail=detail)


async def _readyz(
    session: aiohttp.ClientSession, passwords: Passwords, cacerts: bytes
) -> tuple[int, bytes]:
    """The answer to user ``node``, by the first password that is not refused."""
    try:
        context = trusting(cacerts)
    except (ssl.SSLError, ValueError) as error:
        return 0, f"its CA cannot be trusted: {error}".encode()
    answer = 401, b""
    for password in passwords:
        auth = aiohttp.BasicAuth("node", password)
        answer = await _get(session, f"{SERVER}/v1-k3s/readyz", auth, context)
        if answer[0] != 401:
            if answer[0]:
                passwords.took(password)
            break
    return answer


async def _get(
    session: aiohttp.ClientSession,
    url: str,
    auth: aiohttp.BasicAuth | None = None,
    context: ssl.SSLContext | None = None,
) -> tuple[int, bytes]:
    """Status and body; status 0 with the reason as body where nobody answers."""
    try:
        async with session.get(url, auth=auth, ssl=context or insecure()) as response:
            return response.status, await response.content.read(BODY_LIMIT_BYTES)
    except TimeoutError:
        return 0, b"no answer in time"
    except aiohttp.ClientConnectorCertificateError as error:
        return 0, str(getattr(error.certificate_error, "verify_message", "")).encode()
    except (aiohttp.ClientError, OSError) as error:
        return 0, str(getattr(error, "strerror", None) or "connection broke").encode()
