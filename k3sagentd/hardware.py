# SPDX-License-Identifier: Apache-2.0
"""What names this machine's hardware, so that an identity notices when its card moved.

Read by root (``k3sagentd facts``): DMI's UUID is not readable by others.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from pathlib import Path

PI_SERIAL = ("sys/firmware/devicetree/base/serial-number", "proc/device-tree/serial-number")
DMI_UUID = "sys/class/dmi/id/product_uuid"
NETWORK = "sys/class/net"
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
UPLINKS = ("eth", "en", "host", "mv-")
MARK_KEY = b"k3sagentd hardware mark, version 1"
"""Not the token's: a mark on a Node outlives a rotation."""
WORTHLESS = re.compile(r"0*|f*|.*03000200.?0400.?0500.*|(not.*|default.*|to be filled.*)")
"""Serials and UUIDs that makers leave unset: all zeros, all ones, AMI's placeholder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What there is of marks; an empty one says nothing."""

    serial: str | None = None
    """The Raspberry Pi's serial number."""
    uuid: str | None = None
    """DMI's product UUID."""
    macs: tuple[str, ...] = ()
    """Addresses of the network interfaces, as far as they are burnt in."""


def read_hardware(root: Path = Path("/")) -> Hardware:
    """Read the marks of this machine; what cannot be read is left out."""
    serials = [mark for mark in (_mark(root / path) for path in PI_SERIAL) if mark]
    return Hardware(
        serial=serials[0] if serials else None,
        uuid=_mark(root / DMI_UUID),
        macs=tuple(sorted(_macs(root / NETWORK))),
    )


def mark_of(hardware: Hardware) -> str | None:
    """A mark of this machine that does not show what it is of; None where nothing names it.

    The serial alone where there is one, else all that there is: an image does not change it.
    """
    named = hardware.serial or ",".join((hardware.uuid or "", *hardware.macs)).strip(",")
    if not named:
        return None
    return hmac.new(MARK_KEY, named.encode(), "sha256").hexdigest()[:16]


def same_machine(before: Hardware, now: Hardware) -> bool:
    """Whether two readings are of one machine, in doubt yes only where nothing contradicts.

    A serial decides alone: a network adapter may be swapped. Else the UUIDs must agree, and of
    the MACs, where both have some, one must have stayed.
    """
    if before.serial and now.serial:
        return before.serial == now.serial
    if before.uuid and now.uuid and before.uuid != now.uuid:
        return False
    if before.macs and now.macs:
        return not set(before.macs).isdisjoint(now.macs)
    return True


def _mark(path: Path) -> str | None:
    try:
        text = path.read_bytes()[:256].decode("ascii", "replace").strip("\0 \n").lower()
    except OSError:
        return None
    return None if WORTHLESS.fullmatch(text.replace("-", "")) else text


def _macs(network: Path) -> set[str]:
    try:
        return {mac for mac in map(_burnt_in, network.iterdir()) if mac}
    except OSError:
        return set()


def _burnt_in(interface: Path) -> str | None:
    """The MAC of an adapter; None for bridges, overlays and random addresses.

    A machine of a container manager has no device behind its uplink, but a name that K3s's own
    interfaces never have, and an address that was set (Linux: ``NET_ADDR_SET`` is 3).
    """
    try:
        assigned = (interface / "addr_assign_type").read_text().strip()
        ethernet = (interface / "type").read_text().strip() == "1"
        mac = (interface / "address").read_text().strip().lower()
    except OSError:
        return None
    physical = (interface / "device").exists() and assigned in ("0", "3")
    uplink = interface.name.startswith(UPLINKS) and assigned == "3"
    usable = ethernet and (physical or uplink) and MAC.fullmatch(mac)
    return mac if usable and int(mac.replace(":", ""), 16) else None
