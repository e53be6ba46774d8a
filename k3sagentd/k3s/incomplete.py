# SPDX-License-Identifier: Apache-2.0
"""A conversion from SQLite to etcd that was cut short: before K3s starts, its part goes aside.

K3s copies row by row, takes the etcd that it finds at its next start for whole, and lets its
controllers loose on it (K3S.md 1). While ``state.db`` is there nothing but that is whole. Where
systemd starts K3s, also at a boot without us, ``systemd/before-k3s`` does the same.
"""

from __future__ import annotations

import logging

from k3sagentd.files import write_atomically
from k3sagentd.k3s.data import ETCD, SQLITE, put_aside
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

ASIDE = "etcd.incomplete"
LIMIT = 5
"""Attempts, each of which may leave 64 MB of etcd's log: some power cuts, or a row that etcd does
not take, which is in the way each time."""
WORD = b"cluster-init:"


def attempts(paths: Paths) -> int:
    """How many parts were put aside."""
    return len(list((paths.k3s_data / ETCD).parent.glob(f"{ASIDE}*")))


def clear_the_way(paths: Paths) -> None:
    """Before a start of K3s: it converts from the whole, or, after the last attempt, does not and
    goes on with SQLite."""
    etcd, whole = paths.k3s_data / ETCD, paths.k3s_data / SQLITE
    if not (paths.converting.exists() and whole.exists() and etcd.exists()):
        return
    put_aside(etcd, ASIDE)
    if attempts(paths) >= LIMIT and paths.dropin.exists():
        lines = paths.dropin.read_bytes().splitlines(keepends=True)
        rest = [line for line in lines if not line.startswith(WORD)]
        write_atomically(paths.dropin, b"".join(rest), mode=0o600)
        log.warning("that was the last attempt to convert; K3s goes on with SQLite")
