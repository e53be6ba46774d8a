# SPDX-License-Identifier: Apache-2.0
"""How a joining stand-in speaks to a server: the CA first, then with the token."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp

from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.trust import insecure
from k3sagentd.lab.standin.options import password_of, wrong_hash

TIMEOUT_S = 10.0
"""K3s, pkg/clientaccess/token.go: defaultClientTimeout."""


class ServerError(Exception):
    """A server did not give what was asked."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class ServerClient:
    """Asks one server as ``user`` (``server`` or ``node``), with the CA that it showed."""

    def __init__(self, url: str, token: str, user: str) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._auth = aiohttp.BasicAuth(user, password_of(token))
        self._context: ssl.SSLContext | None = None

    async def cacerts(self) -> bytes:
        """The CA, checked against the token's hash, and the server against the CA."""
        if not self.url.startswith("https://"):
            raise ServerError(0, f"only https:// URLs are supported, invalid scheme: {self.url}")
        body = await self._cacerts(insecure(), "failed to get CA certs")
        found = hash_of_cacerts(body)
        if found is None:
            raise ServerError(200, f"failed to get CA certs: {self.url}/cacerts is no certificate")
        self._context = ssl.create_default_context(cadata=body.decode())
        await self._cacerts(self._context, "CA cert validation failed")
        if wrong := wrong_hash(self._token, found):
            raise ServerError(0, wrong)
        return body

    async def _cacerts(self, context: ssl.SSLContext, failed: str) -> bytes:
        url = f"{self.url}/cacerts"
        try:
            status, body = await request("GET", url, context)
        except ServerError as error:
            raise ServerError(0, f"{failed}: {error}") from error
        if status != 200:
            raise ServerError(status, f"{failed}: {url}: {status}")
        return body

    async def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """One authenticated request; raises ServerError."""
        if self._context is None:
            await self.cacerts()
        assert self._context is not None, "cacerts sets it"
        status, answer = await request(
            method, self.url + path, self._context, body=body, auth=self._auth, headers=headers
        )
        if status != 200:
            words = {401: "Unauthorized", 403: "Forbidden", 429: "Too Many Requests"}
            text = words.get(status) or answer[:200].decode(errors="replace")
            raise ServerError(status, f"{self.url}{path}: {status} {text}")
        return answer


async def request(
    method: str,
    url: str,
    context: ssl.SSLContext,
    *,
    body: Any = None,
    auth: aiohttp.BasicAuth | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body; raises ServerError where nobody answers."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(
                method, url, json=body, ssl=context, auth=auth, headers=headers
            ) as response,
        ):
            return response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
        raise ServerError(0, f"{url}: {cause or type(error).__name__}") from error
