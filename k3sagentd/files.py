# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: write, fsync, rename, fsync of the directory.

Owns how bytes reach the disk. Knows nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def fsync_directory(path: Path) -> None:
    """Make the names in ``path`` (a directory) durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace ``path`` with ``data``, whole or not at all.

    With ``durable`` it has survived a power cut when this returns; without, only readers are
    protected (right for /run). Raises OSError; then ``path`` is as it was.
    """
    # One name for all attempts, so that a kill leaves at most one file behind, and the next attempt
    # takes it away; made anew (O_EXCL), so that nobody else can have put something there.
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        fsync_directory(path.parent)


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make ``path``, which must not be there, with ``data``, whole or not at all; durable.

    Raises FileExistsError where something is there, which stays as it is, and OSError.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _name(temporary: Path, path: Path) -> None:
    """Give the file the name ``path``; a link fails where a rename would replace."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # FAT, which a Pi's boot partition has, knows no links.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)


def wipe(path: Path) -> None:
    """Overwrite and remove; a card's own copies of old blocks are beyond us. Raises OSError.

    It goes to a hidden name first, for good: at no instant, whatever is cut off, does ``path``
    have anything but what it had. ``finish_wipe`` ends what was cut off.
    """
    finish_wipe(path)
    path.rename(wiping_path(path))
    fsync_directory(path.parent)
    finish_wipe(path)


def wiping_path(path: Path) -> Path:
    """Where ``path`` is while it is wiped."""
    return path.with_name(f".{path.name}.wiped")


def finish_wipe(path: Path) -> bool:
    """End a ``wipe`` of ``path`` that was cut off; whether there was one. Raises OSError."""
    hidden = wiping_path(path)
    try:
        fd = os.open(hidden, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with os.fdopen(fd, "wb") as file:
        file.write(b"\0" * os.fstat(fd).st_size)
        file.flush()
        os.fsync(fd)
    hidden.unlink(missing_ok=True)  # somebody else may have finished it meanwhile
    fsync_directory(path.parent)
    return True


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return the bytes of a regular file; more than ``limit_bytes`` raises OSError (EFBIG).

    Symbolic links are not followed: what is read here was put there by us.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(27, f"larger than {limit_bytes} bytes", str(path))
    return data
