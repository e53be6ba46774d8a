# SPDX-License-Identifier: Apache-2.0
"""Peers by name, for networks without multicast: ``seeds`` resolved again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from k3sagentd.discovery.table import Target

log = logging.getLogger(__name__)

RETRY_S = 5.0
RETRY_LIMIT_S = 60.0
REFRESH_S = 600.0
ADDRESSES_PER_SEED_LIMIT = 32
HINT = "a name server with a public address is barred by the unit's IPAddressAllow=, k3sagentd(1)"


def split(seed: str, default_port: int) -> tuple[str, int]:
    """``host[:port]`` in its parts, an IPv6 address with a port in brackets (RFC 3986, 3.2.2).

    Raises ValueError.
    """
    host, port = seed, str(default_port)
    if seed.startswith("["):
        host, bracket, rest = seed[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{seed!r} is no [address]:port")
        port = rest[1:] or port
    elif seed.count(":") == 1:
        host, _, port = seed.partition(":")
    if not host or any(char.isspace() or char == "/" for char in host):
        raise ValueError(f"{seed!r} is no host[:port]")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{seed!r} has no port between 1 and 65535")
    return host, int(port)


async def follow(seed: str, default_port: int, on_target: Callable[[Target], None]) -> None:
    """Resolve one seed for ever, telling each address."""
    host, port = split(seed, default_port)
    loop = asyncio.get_running_loop()
    pause_s = RETRY_S
    while True:
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            if pause_s == RETRY_S:
                log.warning("seed %s cannot be resolved: %s; %s", seed, error.strerror, HINT)
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_LIMIT_S, pause_s * 2)
            continue
        for _, _, _, _, name in found[:ADDRESSES_PER_SEED_LIMIT]:
            on_target(Target(str(name[0]), port))
        pause_s = RETRY_S
        await asyncio.sleep(REFRESH_S)
