# SPDX-License-Identifier: Apache-2.0
"""How root takes a file that the daemon wrote: as if an attacker had put it there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from k3sagentd.errors import DataError

NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENOENT)
"""A symbolic link; a socket; a name that its directory's owner removed again meanwhile."""


def take(path: Path, limit_bytes: int) -> bytes | None:
    """Take the file away and return its bytes; None where there is none. Raises DataError.

    Taken by its name before it is looked at, whatever it is: a bad one must not start us again
    and again, and one that comes meanwhile must not be lost.
    """
    taken = path.with_name(f".taken-{secrets.token_hex(8)}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return None
    try:
        data = _read(taken, limit_bytes)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        data = None
    finally:
        with contextlib.suppress(IsADirectoryError):
            taken.unlink(missing_ok=True)
    if data is None:
        raise DataError(f"{path} is no plain file")
    if len(data) > limit_bytes:
        raise DataError(f"{path} has more than {limit_bytes} bytes")
    return data


def _read(taken: Path, limit_bytes: int) -> bytes | None:
    """Its bytes, one more than the limit at most; None for what is no plain file."""
    fd = os.open(taken, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return None
        return os.read(fd, limit_bytes + 1)
    finally:
        os.close(fd)
