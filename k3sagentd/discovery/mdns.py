# SPDX-License-Identifier: Apache-2.0
"""DNS-SD (RFC 6763) over mDNS (RFC 6762), by python-zeroconf: what we announce, what we see.

What is seen only says where to knock. Records of other sites are dropped here, unconnected.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Callable, Set

from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from k3sagentd.core.words import NodeId
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.discovery.api_name import ApiName
from k3sagentd.discovery.table import Target

log = logging.getLogger(__name__)

SERVICE_TYPE = "_k3sagentd._tcp.local."
TXT_VERSION = "1"
RESOLVE_TIMEOUT_MS = 3000
RESOLVES_LIMIT = 64
"""Resolutions at a time: strangers can name any number of instances."""

OnTarget = Callable[[Target], None]


class Mdns:
    """One presence on the wire, bound to one address; a new address needs a new one.

    Announced is one site id, looked for are all that are ``accepted``.
    """

    def __init__(
        self,
        *,
        node: NodeId,
        site_id: str,
        accepted: Set[str],
        port: int,
        api_name: ApiName,
        on_target: OnTarget,
        on_gone: OnTarget,
    ) -> None:
        self._node = node
        self._api_name = api_name
        self._site_id = site_id
        self._accepted = accepted
        self._port = port
        self._on_target = on_target
        self._on_gone = on_gone
        self._hints: dict[str, str] = {}
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._attachment: Attachment | None = None
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, Target] = {}

    async def attach(self, attachment: Attachment, hints: dict[str, str]) -> None:
        """Announce this node at ``attachment`` and look for others; raises OSError."""
        await self.detach()
        self._attachment, self._hints = attachment, dict(hints)
        v4 = attachment.version == 4
        self._zeroconf = AsyncZeroconf(
            interfaces=[attachment.address if v4 else attachment.index],
            ip_version=IPVersion.V4Only if v4 else IPVersion.V6Only,
        )
        zeroconf = self._zeroconf.zeroconf
        await zeroconf.async_wait_for_start()
        self._browser = AsyncServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[self._on_change])
        # The name is the hash of a public key, so nobody else has it; and where a clone has, both
        # must be seen. Either way probing (RFC 6762, 8.1) would only cost time.
        await self._zeroconf.async_register_service(self._info(), cooperating_responders=True)
        self._api_name.attach(self._zeroconf)

    async def detach(self) -> None:
        """Say goodbye and stop."""
        for task in self._resolving.values():
            task.cancel()
        self._resolving.clear()
        await self._api_name.detach()
        zeroconf, self._zeroconf, self._browser = self._zeroconf, None, None
        if zeroconf is not None:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await zeroconf.async_close()

    async def hint(self, hints: dict[str, str]) -> None:
        """Change what the TXT record hints at."""
        if self._zeroconf is None or hints == self._hints:
            return
        self._hints = dict(hints)
        with contextlib.suppress(OSError):
            await self._zeroconf.async_update_service(self._info())

    def _info(self) -> AsyncServiceInfo:
        assert self._attachment is not None, "attached before it announces"
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{self._node}.{SERVICE_TYPE}",
            port=self._port,
            addresses=[ipaddress.ip_address(self._attachment.address).packed],
            server=f"{self._node}.local.",
            properties={"v": TXT_VERSION, "site": self._site_id, **self._hints},
        )

    # --- what others announce ---------------------------------------------------------------

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            if target := self._known.pop(name, None):
                self._on_gone(target)
            return
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._seen(name, info)
        elif name not in self._resolving and len(self._resolving) < RESOLVES_LIMIT:
            task = asyncio.get_running_loop().create_task(self._resolve(zeroconf, name, info))
            self._resolving[name] = task
            task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, zeroconf: Zeroconf, name: str, info: AsyncServiceInfo) -> None:
        try:
            if await info.async_request(zeroconf, RESOLVE_TIMEOUT_MS):
                self._seen(name, info)
        except OSError as error:
            log.debug("cannot resolve %s: %s", name, error)

    def _seen(self, name: str, info: AsyncServiceInfo) -> None:
        if _text(info, b"site") not in self._accepted or not info.port:
            return
        addresses = info.parsed_scoped_addresses()
        if not addresses:
            return
        target = Target(addresses[0], info.port)
        mine = self._attachment is not None and target.address == self._attachment.address
        if mine and target.port == self._port:
            return
        before = self._known.get(name)
        if before is not None and before != target:
            self._on_gone(before)
        if len(self._known) < RESOLVES_LIMIT * 16 or before is not None:
            self._known[name] = target
        self._on_target(target)


def _text(info: AsyncServiceInfo, key: bytes) -> str | None:
    value = info.properties.get(key)
    return value.decode("ascii", "replace") if isinstance(value, bytes) else None
