# SPDX-License-Identifier: Apache-2.0
"""A clock that K3s may make certificates by: synchronised, kept by an RTC, or that of the peers.

A Raspberry Pi has no RTC and may boot in 1970, or where its last shutdown was. What the peers'
clocks say comes from the daemon, which has it from their authenticated answers; it may only set
the clock forward, only where nothing better keeps it, and not before this package was built.
"""

from __future__ import annotations

import ctypes
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from k3sagentd import schema
from k3sagentd.errors import DataError, MachineError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

WAIT_S = 120.0
"""For time synchronisation, before a clock that can be true is taken as it is."""
TOLERANCE_S = 60.0
FUTURE_LIMIT_S = 30 * 365 * 86400.0
"""Peers that are further than this beyond our build are not believed."""
LIMIT_BYTES = 4096
TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""
TIMEX_BYTES = 512  # struct timex has 208 at most; all zeros only asks


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerClocks:
    """How far the peers' clocks are ahead of ours."""

    peers: int
    median_s: float


class Clock:
    """The machine's clock; tests have one of their own."""

    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def built_s(self) -> float:
        """When this package was built: no true clock is behind that."""
        return Path(__file__).stat().st_mtime

    def synchronised(self) -> bool:
        """Whether the kernel knows its clock to be set by NTP or the like."""
        buffer = ctypes.create_string_buffer(TIMEX_BYTES)
        return 0 <= int(ctypes.CDLL(None).adjtimex(buffer)) < TIME_ERROR

    def has_rtc(self) -> bool:
        """Whether a battery keeps the time."""
        return Path("/sys/class/rtc/rtc0").exists()

    def set(self, to_s: float) -> None:
        """Raises OSError."""
        time.clock_settime(time.CLOCK_REALTIME, to_s)

    def sleep(self) -> None:
        """Until it is worth another look."""
        time.sleep(1.0)


def settle(paths: Paths, clock: Clock) -> Iterator[str]:
    """Return once the clock can be trusted; yields what is waited for. Raises MachineError."""
    for _ in range(int(WAIT_S)):
        if _is_good(paths, clock):
            return
        peers = read(paths)
        if peers is not None and _follow(clock, peers):
            return
        yield f"wait for the clock to be set: it says {_date(clock.now_s())}"
        clock.sleep()
    if clock.now_s() < clock.built_s():
        raise MachineError(
            f"the clock says {_date(clock.now_s())}, before k3sagentd was built; K3s would "
            "make certificates with that date; set it, or let this machine reach a time server"
        )
    log.warning("the clock is not synchronised; it is taken as it is: %s", _date(clock.now_s()))


def _is_good(paths: Paths, clock: Clock) -> bool:
    return clock.synchronised() or (clock.has_rtc() and clock.now_s() >= clock.built_s())


def _follow(clock: Clock, peers: PeerClocks) -> bool:
    """Whether the clock agrees with the peers', after setting it if need be."""
    theirs_s = clock.now_s() + peers.median_s
    if not clock.built_s() <= theirs_s <= clock.built_s() + FUTURE_LIMIT_S:
        return False
    if peers.median_s > TOLERANCE_S:
        log.warning(
            "the clock says %s; it is set to %s, the median of %d peers",
            *(_date(clock.now_s()), _date(theirs_s), peers.peers),
        )
        try:
            clock.set(theirs_s)
        except OSError as error:
            raise MachineError(f"the clock cannot be set: {error.strerror}") from error
        return True
    return clock.now_s() >= clock.built_s()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


# --- the file between daemon and root -------------------------------------------------------


def write(paths: Paths, offsets_s: Mapping[str, float]) -> None:
    """For the daemon: the peers' clocks, by node, as seconds ahead of ours. Raises OSError."""
    if offsets_s:
        median_s = float(statistics.median(offsets_s.values()))
        found = PeerClocks(peers=len(offsets_s), median_s=round(median_s, 1))
        write_atomically(paths.clock, schema.dumps(found).encode(), durable=False)


def read(paths: Paths) -> PeerClocks | None:
    """For root; None while there is nothing that makes sense."""
    try:
        found = schema.loads(PeerClocks, read_bounded(paths.clock, LIMIT_BYTES))
    except (DataError, OSError):
        return None
    sensible = found.peers > 0 and abs(found.median_s) < 2 * FUTURE_LIMIT_S
    return found if sensible else None
