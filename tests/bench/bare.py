# SPDX-License-Identifier: Apache-2.0
"""The reference for discovery: python-zeroconf alone, until it sees all N; and for memory."""

import asyncio
import ipaddress
import sys
import time

from zeroconf import ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

TYPE = "_k3sagentd-bench._tcp.local."


async def main(address: str, expected: int) -> None:
    """Announce, browse, print the Unix time at which all were seen."""
    seen: set[str] = set()
    done = asyncio.Event()

    def changed(zeroconf, service_type, name, state_change) -> None:
        if state_change is ServiceStateChange.Added:
            seen.add(name)
            if len(seen) >= expected:
                done.set()

    print("up", flush=True)
    zeroconf = AsyncZeroconf(interfaces=[address])
    name = f"n{address.replace('.', '-')}.{TYPE}"
    packed = [ipaddress.ip_address(address).packed]
    info = AsyncServiceInfo(TYPE, name, port=1, addresses=packed, server=f"n{address}.local.")
    AsyncServiceBrowser(zeroconf.zeroconf, TYPE, handlers=[changed])
    await zeroconf.async_register_service(info)
    await done.wait()
    print(time.time(), flush=True)
    await asyncio.sleep(1.0)
    await zeroconf.async_close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
