# SPDX-License-Identifier: Apache-2.0
"""The daemon's own socket: what the commands ask it. HTTP over a unix socket, JSON bodies."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from k3sagentd.errors import K3sagentdError, PermissionDeniedError, UnavailableError

SOCKET_MODE = 0o660
WAIT_LIMIT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 900.0
"""For one step of leaving: another machine drains this one."""
LEAVE_STEPS = ("drain", "stop", "remove")


class Answers(Protocol):
    """What the daemon answers."""

    async def status(self, after: int, wait_s: float) -> dict[str, Any]:
        """``{"rev": n, "status": …}``, once ``rev`` is beyond ``after`` or time is up."""

    def registration(self) -> dict[str, Any] | None:
        """Where to join; None before the seal."""

    async def force(self) -> str | None:
        """Make this the init node; else why not."""

    async def reread(self) -> str | None:
        """Take in the facts that root wrote, and tell the others what follows; else why not."""

    async def leave(self, step: str) -> str | None:
        """Have a ready server ``drain`` or ``remove`` this machine, or say that it may ``stop``.

        Returns when it is done, or with why it is not.
        """


class ControlServer:
    """Serves the commands of this machine."""

    def __init__(self, path: Path, answers: Answers) -> None:
        self._path = path
        self._answers = answers
        app = web.Application(client_max_size=64 * 1024)
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/registration", self._registration)
        app.router.add_post("/v1/cluster-init", self._force)
        app.router.add_post("/v1/facts", self._reread)
        app.router.add_post("/v1/leave", self._leave)
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None)

    async def start(self) -> None:
        """Listen; raises OSError."""
        await self._runner.setup()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        await web.UnixSite(self._runner, str(self._path)).start()
        self._path.chmod(SOCKET_MODE)

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _status(self, request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", "-1"))
            wait_s = min(WAIT_LIMIT_S, max(0.0, float(request.query.get("wait", "0"))))
        except ValueError:
            return web.json_response({"error": "after and wait are numbers"}, status=400)
        return web.json_response(await self._answers.status(after, wait_s))

    async def _registration(self, request: web.Request) -> web.Response:
        answer = self._answers.registration()
        if answer is None:
            return web.json_response({"error": "the site is not sealed yet"}, status=409)
        return web.json_response(answer)

    async def _force(self, request: web.Request) -> web.Response:
        return _done(await self._answers.force())

    async def _reread(self, request: web.Request) -> web.Response:
        return _done(await self._answers.reread())

    async def _leave(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError:
            body = None
        step = body.get("step") if isinstance(body, dict) else None
        if step not in LEAVE_STEPS:
            allowed = ", ".join(LEAVE_STEPS)
            return web.json_response({"error": f"step is none of {allowed}"}, status=400)
        return _done(await self._answers.leave(step))


def _done(error: str | None) -> web.Response:
    return web.json_response({"error": error} if error else {}, status=409 if error else 200)


class ControlClient:
    """Asks the daemon behind ``path``.

    Raises UnavailableError where there is none, PermissionDeniedError where one may not ask.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def status(self, after: int = -1, wait_s: float = 0.0) -> dict[str, Any]:
        """``{"rev": n, "status": …}``."""
        query = f"/v1/status?after={after}&wait={wait_s}"
        return await self._ask("GET", query, wait_s + CONNECT_TIMEOUT_S)

    async def registration(self) -> dict[str, Any]:
        """Where to join; raises K3sagentdError before the seal."""
        return await self._ask("GET", "/v1/registration", CONNECT_TIMEOUT_S)

    async def force(self) -> None:
        """Make this node the init node; raises K3sagentdError."""
        await self._ask("POST", "/v1/cluster-init", 60.0)

    async def reread(self) -> None:
        """Have it take in the facts that root wrote; raises K3sagentdError."""
        await self._ask("POST", "/v1/facts", CONNECT_TIMEOUT_S)

    async def leave(self, step: str) -> None:
        """Ask a ready server for one of ``LEAVE_STEPS``; raises K3sagentdError."""
        await self._ask("POST", "/v1/leave", LEAVE_TIMEOUT_S, {"step": step})

    async def _ask(
        self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        async with self._session() as session:
            try:
                async with session.request(
                    method,
                    f"http://localhost{path}",
                    json=body,
                    timeout=aiohttp.ClientTimeout(timeout_s),
                ) as response:
                    answer: dict[str, Any] = await response.json()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if getattr(error, "errno", None) == errno.EACCES:
                    raise PermissionDeniedError(
                        f"{self._path}: permission denied; run it as root, or as a member of the "
                        "group k3sagentd"
                    ) from error
                raise UnavailableError(
                    f"the daemon does not answer at {self._path}; is it running? "
                    "(systemctl status k3sagentd)"
                ) from error
        if response.status == 409:
            raise UnavailableError(str(answer.get("error")))
        if response.status != 200:
            raise K3sagentdError(str(answer.get("error")))
        return answer

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(path=str(self._path))
        async with aiohttp.ClientSession(connector=connector) as session:
            yield session
