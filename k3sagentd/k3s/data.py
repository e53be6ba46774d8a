# SPDX-License-Identifier: Apache-2.0
"""K3s's data directory: what it holds, whose it is, and how a part of it is put aside.

Nothing in it is ever deleted: ``put_aside`` is the only way in which something goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from k3sagentd.core.k3s import Datastore
from k3sagentd.files import fsync_directory, read_bounded, write_atomically
from k3sagentd.k3s.ca import hash_of_cacerts

log = logging.getLogger(__name__)

MARKER = "k3sagentd.json"
"""In K3s's data directory: which generation's and epoch's order made it."""
ETCD = "server/db/etcd"
SQLITE = "server/db/state.db"
TOMBSTONE = "tombstone"
"""In etcd's directory, once its member was removed (K3s, pkg/etcd/etcd.go). K3s then starts anew:
by joining, or, where the server that it was told of does not answer, as a cluster of its own under
the old CA. So where K3s is ours it does not start while that is there."""
AGENT = "agent/client-kubelet.crt"
CA_LIMIT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """The order of ours that made a cluster's data."""

    epoch: int
    generation: int = 0

    def describe(self) -> str:
        """As people read it."""
        later = f" of generation {self.generation}" if self.generation else ""
        return f"epoch {self.epoch}{later}"


def datastore(data: Path) -> Datastore:
    """What K3s would go on with at its next start (K3S.md 1)."""
    if (data / ETCD / "member/wal").exists():
        return Datastore.ETCD
    if (data / SQLITE).exists():
        return Datastore.SQLITE
    if (data / AGENT).exists():
        return Datastore.AGENT
    return Datastore.NONE


def is_removed(data: Path) -> bool:
    """Whether the data is of a member that etcd does not know any more."""
    return (data / ETCD / TOMBSTONE).exists()


def read_marker(data: Path) -> Marker | None:
    """Which init order of ours made this data; None: none did."""
    try:
        found = json.loads(read_bounded(data / MARKER, 4096))
        marker = Marker(epoch=found["epoch"], generation=found.get("generation", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for number in (marker.epoch, marker.generation):
        if type(number) is not int or number < 0:
            return None
    return marker


def write_marker(data: Path, marker: Marker) -> None:
    """Say whose this data will be; before K3s first starts."""
    write(data / MARKER, (json.dumps(asdict(marker)) + "\n").encode(), 0o644)


def ca_hash(data: Path) -> str | None:
    """The hash of the server CA, or of the agent's copy of it, as of ``/cacerts`` (K3S.md 2)."""
    for name in ("server/tls/server-ca.crt", "agent/server-ca.crt"):
        with contextlib.suppress(OSError):
            found = read_bounded(data / name, CA_LIMIT_BYTES)
            return hash_of_cacerts(found) or hashlib.sha256(found).hexdigest()
    return None


def put_aside(path: Path, name: str) -> Path:
    """Rename ``path`` to ``name`` beside it, or ``name-2`` and so on; durable when it returns."""
    aside, number = path.with_name(name), 2
    while aside.exists():
        aside, number = path.with_name(f"{name}-{number}"), number + 1
    move(path, aside)
    log.warning("%s is %s now", path, aside)
    return aside


def move(path: Path, to: Path) -> None:
    """Rename, durable when it returns."""
    path.rename(to)
    for directory in {path.parent, to.parent}:
        fsync_directory(directory)


def write(path: Path, content: bytes, mode: int) -> bool:
    """Write ``path`` unless it says that already; whether it changed."""
    try:
        same = path.read_bytes() == content and path.stat().st_mode & 0o777 == mode
    except OSError:
        same = False
    if not same:
        write_atomically(path, content, mode=mode)
    return not same
