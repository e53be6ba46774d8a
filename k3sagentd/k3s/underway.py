# SPDX-License-Identifier: Apache-2.0
"""Commands of the operator that take several steps: how far they are, and nothing between them.

A command that was killed half-way leaves its progress behind. Until it is run again no order
touches K3s: the daemon knows nothing of the step in between, and would undo it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass

from k3sagentd import schema
from k3sagentd.core.words import NodeId
from k3sagentd.errors import BusyError, DataError, MachineError
from k3sagentd.files import fsync_directory, read_bounded, write_atomically
from k3sagentd.paths import Paths

LIMIT_BYTES = 64 * 1024
HOLDER_LIMIT = 200
"""Characters of the line that says who holds the lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A command that is under way; which fields it has is its own matter."""

    command: str
    """``leave``, or ``repair-addresses``."""
    step: str
    """The last one that is done."""
    address: str | None = None
    """The machine's new address."""
    was: str | None = None
    """The one that etcd knew the machine by when the command began."""
    sure: bool = True
    """Whether etcd knows it by no other: the step that may change that has not begun."""
    server: str | None = None
    """The server that is asked, as ``https://host:6443``; None: none answers."""
    name: str | None = None
    """The machine's Node, and its uid."""
    uid: str | None = None
    node: NodeId | None = None
    """The machine's own node id, which its Node bears as a label (``cluster.NODE_LABEL``)."""


@contextlib.contextmanager
def only(paths: Paths, command: str) -> Iterator[None]:
    """As the only ``command`` of an operator on this machine; raises BusyError at once else.

    From before it looks how far things are to its end, also while it asks: what it saw and what
    was answered would be of before the other one.
    """
    paths.root_run.mkdir(mode=0o700, parents=True, exist_ok=True)
    with paths.command_lock.open("a+") as lock:
        lock.seek(0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock.read(HOLDER_LIMIT).strip() or "another command of an operator"
            raise BusyError(
                f"{holder} runs on this machine already, or waits for its answer; wait until it "
                "has ended, or end it"
            ) from None
        lock.truncate(0)
        lock.write(f"k3sagentd {command} (pid {os.getpid()}{_terminal()})")
        lock.flush()
        yield


def _terminal() -> str:
    """Where its operator sits, as ``w`` shows it."""
    with contextlib.suppress(OSError):
        return f", {os.ttyname(0).removeprefix('/dev/')}"
    return ""


@contextlib.contextmanager
def alone(paths: Paths) -> Iterator[None]:
    """As the only one of root's parts that does something to K3s; waits for another."""
    paths.root_run.mkdir(mode=0o700, parents=True, exist_ok=True)
    with paths.apply_lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(paths: Paths) -> Progress | None:
    """What is under way; raises MachineError."""
    try:
        return schema.loads(Progress, read_bounded(paths.underway, LIMIT_BYTES))
    except FileNotFoundError:
        return None
    except DataError as error:
        raise MachineError(f"{paths.underway}: {error}") from error


def save(paths: Paths, progress: Progress) -> Progress:
    """Keep it, also over a power cut; returns it."""
    paths.underway.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(paths.underway, schema.dumps(progress, indent=1).encode(), mode=0o600)
    return progress


def clear(paths: Paths) -> None:
    """The command has ended."""
    paths.underway.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        fsync_directory(paths.underway.parent)


def check(paths: Paths, mine: str | None = None) -> None:
    """Raise MachineError while a command other than ``mine`` is half done."""
    progress = load(paths)
    if progress is not None and progress.command != mine:
        raise MachineError(
            f"k3sagentd {progress.command} was not finished on this machine; run it again"
        )
