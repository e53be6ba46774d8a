# SPDX-License-Identifier: Apache-2.0
"""Chance with a name: every draw has a key, so leaving one fault out changes no other draw.

That is what makes a failing run shrink: its faults are a set of (fault, key) pairs, and any
subset of them is again a run.
"""

from __future__ import annotations

import math
from collections import Counter
from enum import StrEnum

Key = tuple[int, ...]
Strike = tuple["Fault", Key]


class Fault(StrEnum):
    """All that the world does to a site, in the words of the report."""

    # Weather: each has a rate per decision.
    LOSS = "message lost"
    DUPLICATE = "message twice"
    DELAY = "message late and out of order"
    CRASH = "power cut between two effects"
    CRASH_IN_WRITE = "power cut within a write"
    INSTALL_FAILS = "install fails, may be tried again"
    ORDER_LOST = "apply dies with its order"
    # Happenings: each has its time and machine.
    POWER_CUT = "power cut"
    DAEMON_KILLED = "daemon killed and started again"
    PAUSE = "daemon stopped for a while"
    PARTITION = "partition"
    ONE_WAY = "partition one way"
    BRIDGE = "partition with a node that sees both sides"
    DAMAGE = "state file damaged"
    DISK_FULL = "disk takes no writes for a while"
    CLOCK_JUMP = "wall clock jumps"
    ADDRESS = "address goes and comes back another"
    K3S_DIES = "K3s dies and is started again"
    GONE = "machine gone for good"
    REIMAGE_EARLY = "machine re-imaged before the seal"
    REIMAGE_LATE = "machine re-imaged after the seal"
    CLONE = "machine cloned with its identity"
    STRANGER = "stranger at the door"
    FLAGS = "a flag changed that all servers share"
    RECONFIGURED = "nodes changed and the daemon started again"
    SERVER_GONE = "server gone for good after the seal"
    LATE = "machines added after the seal"
    ROLE = "role changed by hand after the seal"
    FORCED = "all servers gone for good, another start forced"
    # What a machine is from the start.
    SLOW_DISK = "slow disk"
    SLOW_K3S = "K3s starts slowly"
    NO_INSTALL = "install fails for good"
    LATE_BOOT = "machine booted late"
    CLOCK_RATE = "monotonic clock runs wrong"
    OTHER_NODES = "another nodes"
    OTHER_SERVERS = "another servers"
    EXTRA = "more machines than nodes"
    AGENT_ROLE = "role: agent"
    SQLITE = "SQLite was there"
    ETCD = "etcd was there"
    TWO_CLUSTERS = "two clusters were there"


NUMBER = {fault: number for number, fault in enumerate(Fault)}
MASK = (1 << 64) - 1


class Dice:
    """Draws for one run; with ``only``, exactly those faults strike and no other."""

    def __init__(self, seed: int, only: frozenset[Strike] | None = None) -> None:
        self._seed = seed
        self._only = only
        self.struck: list[Strike] = []

    def uniform(self, *key: int) -> float:
        """A number in [0, 1) that depends on the seed and the key alone."""
        # Python hashes tuples of integers the same everywhere (xxHash without a seed); it does
        # not mix the last lane well, hence the two rounds of a multiply and a shift (MurmurHash3).
        x = hash((self._seed, *key)) & MASK
        x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
        x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
        return (x >> 11) * 2.0**-53

    def exponential(self, mean: float, *key: int) -> float:
        """A number above 0 with this mean."""
        return -mean * math.log(1.0 - self.uniform(*key))

    def strikes(self, fault: Fault, rate: float, *key: int) -> bool:
        """Whether a fault of this rate strikes here."""
        if self._only is not None:
            hit = (fault, key) in self._only
        else:
            hit = rate > 0.0 and self.uniform(1000 + NUMBER[fault], *key) < rate
        if hit:
            self.struck.append((fault, key))
        return hit


def counted(struck: list[Strike]) -> Counter[Fault]:
    """How often each fault struck."""
    return Counter(fault for fault, _ in struck)
