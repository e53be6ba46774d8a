# SPDX-License-Identifier: Apache-2.0
"""A clock that K3s may make certificates by: synchronised, kept by an RTC, or that of the peers.

A Raspberry Pi may have no RTC, or one without a battery, and boot in 1970 or where its last
shutdown was. What the peers' clocks say comes from the daemon, which has it from their
authenticated answers, by CLOCK_MONOTONIC: that is one for both of us, and nobody sets it. It may
only set the clock forward, only where nothing better keeps it, only where most peers agree, and not
before this package was built.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from k3sagentd import schema, version
from k3sagentd.errors import DataError, MachineError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

WAIT_S = 120.0
"""For time synchronisation, before a clock that can be true is taken as it is."""
TOLERANCE_S = 60.0
YEAR_S = 365 * 86400.0
FUTURE_LIMIT_S = 10 * YEAR_S
"""Peers that are further than this beyond our build are not believed: twice the life of a Debian
release, its long-term support included."""
LONE_LIMIT_S = 3 * YEAR_S
"""As above, for one peer that nobody confirms: new machines seldom get a package that is older."""
PEERS_LIMIT = 99
LIMIT_BYTES = 8192
TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""
TIMEX_BYTES = 512  # struct timex has 208 at most; all zeros only asks


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerClocks:
    """What the peers' clocks say, each less our CLOCK_MONOTONIC: their time when we booted."""

    at_boot_s: tuple[float, ...]


class Clock:
    """The machine's clock; tests have one of their own."""

    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def monotonic_s(self) -> float:
        """The clock that nobody sets, the daemon's as well."""
        return time.monotonic()

    def built_s(self) -> float:
        """When this package was built: no true clock is behind that."""
        with contextlib.suppress(OSError, ValueError):
            return version.built_s()
        return Path(__file__).stat().st_mtime

    def synchronised(self) -> bool:
        """Whether the kernel knows its clock to be set by NTP or the like."""
        buffer = ctypes.create_string_buffer(TIMEX_BYTES)
        return 0 <= int(ctypes.CDLL(None).adjtimex(buffer)) < TIME_ERROR

    def rtcs_s(self) -> list[float]:
        """What the RTCs say; one without a battery began anew when the power came."""
        found = []
        for file in Path("/sys/class/rtc").glob("rtc*/since_epoch"):
            with contextlib.suppress(OSError, ValueError):
                found.append(float(file.read_text()))
        return found

    def set(self, to_s: float) -> None:
        """Raises OSError."""
        time.clock_settime(time.CLOCK_REALTIME, to_s)

    def sleep(self) -> None:
        """Until it is worth another look."""
        time.sleep(1.0)


def settle(paths: Paths, clock: Clock) -> Iterator[str]:
    """Return once the clock can be trusted; yields what is waited for. Raises MachineError."""
    for _ in range(int(WAIT_S)):
        if _is_good(clock):
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


def _is_good(clock: Clock) -> bool:
    if clock.synchronised():
        return True
    now_s, built_s = clock.now_s(), clock.built_s()
    return any(rtc_s >= built_s and abs(rtc_s - now_s) <= TOLERANCE_S for rtc_s in clock.rtcs_s())


def _follow(clock: Clock, peers: PeerClocks) -> bool:
    """Whether the clock agrees with the peers', after setting it if need be."""
    theirs_s = agreed(peers, clock.monotonic_s(), clock.built_s())
    if theirs_s is None:
        return False
    now_s = clock.now_s()
    if theirs_s - now_s > TOLERANCE_S:
        log.warning(
            "the clock says %s; it is set to %s, the median of %d peers",
            *(_date(now_s), _date(theirs_s), len(peers.at_boot_s)),
        )
        try:
            clock.set(theirs_s)
        except OSError as error:
            raise MachineError(f"the clock cannot be set: {error.strerror}") from error
        return True
    return now_s - theirs_s <= TOLERANCE_S


def agreed(peers: PeerClocks, monotonic_s: float, built_s: float) -> float | None:
    """The time that more than half of the peers have, as one of them has it; else None."""
    every = [at_boot_s + monotonic_s for at_boot_s in peers.at_boot_s]
    possible = [each for each in every if built_s <= each <= built_s + FUTURE_LIMIT_S]
    if not possible:
        return None
    median_s = statistics.median_high(possible)
    near = sum(abs(each - median_s) <= TOLERANCE_S for each in possible)
    if 2 * near <= len(every) or (near == 1 and median_s > built_s + LONE_LIMIT_S):
        return None
    return median_s


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


# --- the file between daemon and root -------------------------------------------------------


def write(paths: Paths, at_boot_s: Mapping[str, float]) -> None:
    """For the daemon: by node, its clock less our CLOCK_MONOTONIC. Raises OSError."""
    if at_boot_s:
        some = sorted(at_boot_s.items())[:PEERS_LIMIT]
        found = PeerClocks(at_boot_s=tuple(round(each, 1) for _, each in some))
        write_atomically(paths.clock, schema.dumps(found).encode(), durable=False)


def read(paths: Paths) -> PeerClocks | None:
    """For root; None while there is nothing that makes sense."""
    try:
        found = schema.loads(PeerClocks, read_bounded(paths.clock, LIMIT_BYTES))
    except (DataError, OSError):
        return None
    sensible = 0 < len(found.at_boot_s) <= PEERS_LIMIT and all(map(math.isfinite, found.at_boot_s))
    return found if sensible else None
