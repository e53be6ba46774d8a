# SPDX-License-Identifier: Apache-2.0
"""The cluster's name on the local network, ``k3s-<site>.local``: answered by every ready server.

All of them answer with the same records, those of all ready servers, so that the name is one
unique record set with several responders, which RFC 6762 (section 8.1) takes for no conflict.
Which addresses these are is told from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging

from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

log = logging.getLogger(__name__)

SERVICE_TYPE = "_k3s-api._tcp.local."
API_PORT = 6443
TTL_S = 120
"""Of every record (RFC 6762, section 10, for host names): what no goodbye reached is gone then."""


class ApiName:
    """What this node answers for the name; nothing while no addresses are told."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._wanted: tuple[str, ...] = ()
        self._shown: tuple[str, ...] = ()
        self._zeroconf: AsyncZeroconf | None = None
        self._task: asyncio.Task[None] | None = None

    def show(self, addresses: tuple[str, ...]) -> None:
        """Answer with ``addresses`` from now on; with none, do not answer."""
        if addresses != self._wanted:
            self._wanted = addresses
            self._follow_soon()

    def attach(self, zeroconf: AsyncZeroconf) -> None:
        """Answer through ``zeroconf`` from now on."""
        self._zeroconf, self._shown = zeroconf, ()
        self._follow_soon()

    async def detach(self) -> None:
        """Fall silent without a goodbye: the others' answers, and K3s itself, may well go on."""
        zeroconf, self._zeroconf = self._zeroconf, None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if zeroconf is not None and self._shown:
            zeroconf.zeroconf.registry.async_remove(self._info(self._shown))
        self._shown = ()

    def _follow_soon(self) -> None:
        if self._zeroconf is not None and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """Show what is wanted, one change after the other, until nothing is left to change."""
        while (zeroconf := self._zeroconf) is not None and self._shown != self._wanted:
            before, self._shown = self._shown, self._wanted
            try:
                if not self._shown:
                    await self._withdraw(zeroconf, before)
                elif before:
                    await (await zeroconf.async_update_service(self._info(self._shown)))
                else:
                    info = self._info(self._shown)
                    # No probing: the others have the name, and are meant to.
                    await (await zeroconf.async_register_service(info, cooperating_responders=True))
            except OSError as error:
                log.warning("cannot announce %s: %s", self._name, error.strerror)
            else:
                log.info("%s is %s", self._name, ", ".join(self._shown) or "not answered here")

    async def _withdraw(self, zeroconf: AsyncZeroconf, shown: tuple[str, ...]) -> None:
        """Stop answering. A goodbye would take the name from the other servers as well: their next
        announcement takes our address out of every cache. Only who was alone says it."""
        if len(shown) == 1:
            await (await zeroconf.async_unregister_service(self._info(shown)))
        else:
            zeroconf.zeroconf.registry.async_remove(self._info(shown))

    def _info(self, addresses: tuple[str, ...]) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{self._name.removesuffix('.local')}.{SERVICE_TYPE}",
            port=API_PORT,
            addresses=packed(addresses),
            server=f"{self._name}.",
            properties={},
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )


def packed(addresses: tuple[str, ...]) -> list[bytes]:
    """As in the records; what a peer gave for its address and is none is left out."""
    found = []
    for address in addresses:
        with contextlib.suppress(ValueError):
            found.append(ipaddress.ip_address(address).packed)
    return found
