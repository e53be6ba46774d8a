# SPDX-License-Identifier: Apache-2.0
"""K3s's own conversion of a single server's SQLite to etcd, followed to its end (K3S.md 1).

K3s converts at a start with ``cluster-init`` and renames ``state.db`` when every row is in etcd.
Cut short, it would go on with the part that it had copied: then that part is put aside, and it
converts again from the whole (``incomplete``).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.files import fsync_directory, write_atomically
from k3sagentd.k3s import incomplete
from k3sagentd.k3s.data import SQLITE
from k3sagentd.k3s.ownership import answers, is_adopted
from k3sagentd.k3s.servers import pings
from k3sagentd.k3s.work import Work
from k3sagentd.paths import Paths

OLDEST = (1, 22, 2)
"""Older releases start with an empty etcd beside the SQLite data (K3S.md 1)."""
VERSION = re.compile(r"\bv(\d+)\.(\d+)\.(\d+)")
CONVERT_S = 900.0
"""A cluster of thousands of objects, row by row on an SD card, takes minutes."""
POLL_S = 0.5
STARTS_LIMIT = 3


def check(work: Work) -> None:
    """Raise HopelessError unless the K3s that is here converts, and can be started for it.

    To be asked before K3s is told anything.
    """
    said = work.install.version()
    found = VERSION.search(said or "")
    if found is None:
        raise HopelessError(
            f"the version of K3s cannot be told ({said or 'k3s --version says nothing'}); it must "
            "be v1.22.2 or later to convert SQLite to etcd"
        )
    if tuple(map(int, found.groups())) < OLDEST:
        raise HopelessError(
            f"K3s is {found[0]} here; releases before v1.22.2 start empty when SQLite is to become "
            "etcd: upgrade K3s first"
        )
    _check_attempts(work)
    if not work.install.running() and answers():
        raise HopelessError(
            "K3s runs here, but not as a service that k3sagentd could restart; stop it, and it is "
            "started again to convert its data from SQLite to etcd"
        )


def _check_attempts(work: Work) -> None:
    """Raise HopelessError where K3s has begun, and not ended, too often."""
    if not (work.paths.k3s_data / SQLITE).exists():
        return
    if (found := incomplete.attempts(work.paths)) >= incomplete.LIMIT:
        parts = work.paths.k3s_data / f"server/db/{incomplete.ASIDE}*"
        raise HopelessError(
            f"K3s began {found} times to convert its data from SQLite to etcd and did not end; it "
            "goes on with SQLite. Its log says why (journalctl -u k3s); to have it tried again, "
            f"remove {parts}"
        )


def begin(paths: Paths) -> None:
    """Note that K3s converts for us, before it is told: it may be started by others than us."""
    paths.converting.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not paths.converting.exists():
        write_atomically(paths.converting, b"")


def convert(work: Work) -> Iterator[str]:
    """Start K3s, whose configuration says ``cluster-init``, until its data is in etcd as a whole.

    Raises MachineError where that takes too long, HopelessError where K3s does not do it.
    """
    paths = work.paths
    begin(paths)
    yield "have K3s convert its data from SQLite to etcd"
    deadline_s = time.monotonic() + CONVERT_S
    starts = 0
    while (paths.k3s_data / SQLITE).exists():
        _check_attempts(work)  # its unit starts it again by itself
        running = work.install.running()
        if not running or pings():
            # Up, with its SQLite data still there: it did not convert, or not to the end.
            if starts >= STARTS_LIMIT:
                raise HopelessError(
                    f"K3s was started {starts} times with cluster-init and did not convert "
                    f"{paths.k3s_data / SQLITE}; its log says why (journalctl -u k3s)"
                )
            if running:
                work.install.halt()
            _start(work)
            starts += 1
        if time.monotonic() > deadline_s:
            raise MachineError(f"K3s did not convert its data in {CONVERT_S:.0f} s; it goes on")
        time.sleep(POLL_S)
    # K3s's rename before our word of it: no power cut may take the first back and leave the second.
    fsync_directory((paths.k3s_data / SQLITE).parent)
    paths.converting.unlink(missing_ok=True)
    if not work.install.running():
        _start(work)


def _start(work: Work) -> None:
    incomplete.clear_the_way(work.paths)
    work.install.start(ServerOrAgent.SERVER, at_boot=not is_adopted(work.paths, work.config))
