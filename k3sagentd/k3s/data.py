# SPDX-License-Identifier: Apache-2.0
"""K3s's data directory: what it holds, whose it is, and how a part of it is put aside.

Nothing in it is ever deleted: ``put_aside`` is the only way in which something goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from k3sagentd.core.k3s import Datastore
from k3sagentd.files import fsync_directory, read_bounded, write_atomically
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.mounts import mount_points

log = logging.getLogger(__name__)

MARKER = "k3sagentd.json"
"""In K3s's data directory: which node's order made it, of which epoch and generation."""
ETCD = "server/db/etcd"
SQLITE = "server/db/state.db"
TOMBSTONE = "tombstone"
"""In etcd's directory, once its member was removed (K3s, pkg/etcd/etcd.go). K3s then starts anew:
by joining, or, where the server that it was told of does not answer, as a cluster of its own under
the old CA. So no server starts while that is there (``systemd/check-k3s``)."""
AGENT = "agent/client-kubelet.crt"
CA_LIMIT_BYTES = 256 * 1024
LAST = ("agent", "server", MARKER, "db", "tls", Path(AGENT).name, "server-ca.crt", TOMBSTONE)
"""Of what is moved piece by piece: that by which the data is known goes last, in this order.

Of K3s's whole directory the marker, without which the rest would be somebody's that was there
before us; before it the server's part, which makes it a server's. Of the server's part etcd, of the
agent's the kubelet's certificate, of etcd's the tombstone. The CA stays as long: without it the
data would be that of an unknown cluster.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """The order of ours that made a cluster's data."""

    epoch: int
    generation: int = 0
    node: str | None = None
    """The init node. None: nobody can say whose life that epoch is of, so of no node that asks."""

    def is_by(self, node: str) -> bool:
        """Whether an order to ``node`` made it; else the data was there before that node was."""
        return bool(node) and self.node == node

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
        node = found.get("node")
        marker = Marker(
            epoch=found["epoch"],
            generation=found.get("generation", 0),
            node=node if isinstance(node, str) else None,
        )
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


def put_aside(path: Path, name: str, *, keep: tuple[str, ...] = ()) -> Path:
    """Rename ``path`` to ``name`` beside it, or ``name-2`` and so on; durable when it returns.

    ``name`` begins with that of ``path`` and a dot. A mount point cannot be renamed, and a disk
    that is mounted below would come back at the next boot with all that it has: there the content,
    but ``keep``, goes into ``name`` inside. Killed at any point, that is finished by the next call.
    Returns where it is now. Raises OSError.
    """
    if mounts := mount_points(path):
        return _empty(path, name.removeprefix(path.name), mounts, keep)
    aside, number = path.with_name(name), 2
    while aside.exists():
        aside, number = path.with_name(f"{name}-{number}"), number + 1
    move(path, aside)
    log.warning("%s is %s now", path, aside)
    return aside


def has_content(path: Path) -> bool:
    """Whether there is anything that ``put_aside`` would move."""
    if not path.is_dir():
        return False
    mounts = mount_points(path)
    return any(_moves(path, mounts) if mounts else path.iterdir())


def _moves(path: Path, mounts: Collection[Path]) -> Iterator[Path]:
    """What ``_empty`` would move."""
    holding = {each for mount in mounts for each in (mount, *mount.parents)}
    for piece in path.iterdir():
        if piece not in holding:
            if not _stays(piece):
                yield piece
        elif piece.is_dir():
            yield from _moves(piece, mounts)


def _empty(path: Path, suffix: str, mounts: Collection[Path], keep: tuple[str, ...] = ()) -> Path:
    """Move what is in ``path`` to a directory in there, and likewise in what is mounted below."""
    pieces = [each for each in path.iterdir() if not _stays(each) and each.name not in keep]
    pieces.sort(key=lambda each: (LAST.index(each.name) + 1 if each.name in LAST else 0, each.name))
    holding = {each for mount in mounts for each in (mount, *mount.parents)}
    going = [each for each in pieces if each not in holding]
    aside = _inside(path, f"{path.name}{suffix}", going)
    if going:
        aside.mkdir(mode=0o700, exist_ok=True)
        fsync_directory(path)
    for each in pieces:
        if each not in holding:
            move(each, aside / each.name)
        elif each.is_dir():  # a file that somebody mounted has no inside, and stays
            _empty(each, suffix, mounts)
    if going:
        log.warning("what was in %s is in %s now", path, aside)
    return aside


def _stays(piece: Path) -> bool:
    """What was put aside in there before, and what a filesystem has of its own."""
    ours = piece.name.startswith(f"{piece.parent.name}.") and piece.is_dir()
    return ours or piece.name == "lost+found"


def _inside(path: Path, name: str, going: Collection[Path]) -> Path:
    """A directory in ``path`` that has nothing yet of what is to go there. So one that a call which
    was killed has begun to fill: what belongs together stays together."""
    aside, number = path / name, 2
    while any(os.path.lexists(aside / each.name) for each in going):
        aside, number = path / f"{name}-{number}", number + 1
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
