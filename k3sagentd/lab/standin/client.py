# SPDX-License-Identifier: Apache-2.0
"""How a joining stand-in speaks to a server: the CA first, then with the token."""

from __future__ import annotations

from typing import Any

import aiohttp

from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.probe import insecure
from k3sagentd.lab.standin.options import check_hash, password_of


class ServerError(Exception):
    """A server did not give what was asked."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class ServerClient:
    """Asks one server as ``user`` (``server`` or ``node``)."""

    def __init__(self, url: str, token: str, user: str) -> None:
        self.url = url
        self._token = token
        self._auth = aiohttp.BasicAuth(user, password_of(token))

    async def cacerts(self) -> bytes:
        """The CA, checked against the token's hash."""
        status, body = await self._ask("GET", "/cacerts", None, auth=False)
        found = hash_of_cacerts(body) if status == 200 else None
        if found is None:
            raise ServerError(status, f"failed to get CA certs: {self.url}/cacerts: {status}")
        check_hash(self._token, found)
        return body

    async def ask(self, method: str, path: str, body: Any = None) -> bytes:
        """One authenticated request; raises ServerError."""
        status, answer = await self._ask(method, path, body, auth=True)
        if status != 200:
            text = answer[:200].decode(errors="replace")
            raise ServerError(status, f"{self.url}{path}: {status} {text}")
        return answer

    async def _ask(self, method: str, path: str, body: Any, *, auth: bool) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(
                    method,
                    self.url + path,
                    json=body,
                    ssl=insecure(),
                    auth=self._auth if auth else None,
                ) as response,
            ):
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ServerError(0, f"{self.url}{path}: {type(error).__name__}") from error
