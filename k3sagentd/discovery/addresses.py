# SPDX-License-Identifier: Apache-2.0
"""Which address this machine has on its site, and word from the kernel when that changes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import ifaddr

# Not /proc/net: under ProcSubset=pid (systemd.exec(5)) that is hidden.
ROUTES_V4 = Path("/proc/self/net/route")
ROUTES_V6 = Path("/proc/self/net/ipv6_route")
INTERFACES = Path("/sys/class/net")
RTF_UP = 0x1
RTMGRP = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""rtnetlink(7) groups: LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""
SETTLE_S = 0.2
"""Changes come in flocks: an address, its route, its duplicate check."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """Where this machine is on the network."""

    interface: str
    index: int
    address: str

    @property
    def version(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.address).version


def attachment(
    interface: str | None, virtual: ipaddress.IPv4Interface | None = None
) -> Attachment | None:
    """The address to be known by: of ``interface``, else of the one with the default route.

    IPv4 goes before IPv6, as in K3s; link-local addresses do not count, and neither does the
    ``virtual`` one, which is here today and elsewhere tomorrow. None while there is none.
    """
    names = [interface] if interface else default_route_interfaces()
    adapters = {adapter.name: adapter for adapter in ifaddr.get_adapters()}
    for name in names:
        adapter = adapters.get(name)
        if adapter is None or adapter.index is None:
            continue
        addresses = [_plain(ip.ip) for ip in adapter.ips]
        moving = virtual.ip if virtual else None
        usable = [each for each in addresses if not each.is_link_local and each != moving]
        for address in sorted(usable, key=lambda each: each.version):
            if not address.is_loopback:
                return Attachment(name, adapter.index, str(address))
    return None


def has_carrier(interface: str) -> bool:
    """Whether anybody is at the other end of the interface (Linux: ABI/testing/sysfs-class-net);
    what cannot be told counts as one."""
    try:
        return (INTERFACES / interface / "carrier").read_text().strip() != "0"
    except FileNotFoundError:
        return True
    except OSError:
        return False  # it is not up


def present() -> list[str]:
    """All addresses of this machine that others may know it by, on whatever interface."""
    found = {_plain(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips}
    return sorted(str(each) for each in found if not (each.is_link_local or each.is_loopback))


def interfaces_v4(name: str) -> list[ipaddress.IPv4Interface]:
    """The IPv4 addresses of interface ``name``, each with its network."""
    return [
        ipaddress.IPv4Interface(f"{ip.ip}/{ip.network_prefix}")
        for adapter in ifaddr.get_adapters()
        if adapter.name == name
        for ip in adapter.ips
        if ip.is_IPv4
    ]


def _plain(ip: str | tuple[str, int, int]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(ip if isinstance(ip, str) else ip[0])


def default_route_interfaces() -> list[str]:
    """Interfaces with a default route, the lowest metric first, IPv4 before IPv6."""
    return [*_default_v4(), *_default_v6()]


def _default_v4() -> list[str]:
    # Iface Destination Gateway Flags RefCnt Use Metric Mask … (Linux: net/ipv4/fib_trie.c)
    rows = [line.split() for line in _lines(ROUTES_V4)[1:]]
    routes = [
        (int(row[6]), row[0])
        for row in rows
        if len(row) > 7 and row[1] == row[7] == "00000000" and int(row[3], 16) & RTF_UP
    ]
    return [name for _, name in sorted(routes)]


def _default_v6() -> list[str]:
    # Destination its-length source its-length next-hop metric refs use flags interface
    rows = [line.split() for line in _lines(ROUTES_V6)]
    routes = [
        (int(row[5], 16), row[9])
        for row in rows
        if len(row) == 10 and int(row[0], 16) == 0 and row[1] == "00" and row[9] != "lo"
    ]
    return [name for _, name in sorted(routes)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


async def changes() -> AsyncIterator[None]:
    """Yield once at first, and after every change of links, addresses or routes."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as sock:
        sock.bind((0, RTMGRP))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        yield
        while True:
            with contextlib.suppress(OSError):  # ENOBUFS: something was missed, so look
                await loop.sock_recv(sock, 65536)
            await asyncio.sleep(SETTLE_S)
            with contextlib.suppress(OSError):
                while sock.recv(65536):
                    pass
            yield
