# SPDX-License-Identifier: Apache-2.0
"""The few system calls that make a machine out of namespaces (namespaces(7), mount(2))."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def enter_network(path: Path) -> None:
    """setns(2) into a named network namespace."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, CLONE_NEWNET), f"setns {path}")
    finally:
        os.close(fd)


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0) -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(str(source)),
        os.fsencode(str(target)),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        None,
    )
    _check(result, f"mount {source} at {target}")


def make_private() -> None:
    """From here on no mount of ours is seen outside."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def compose(directory: Path, own: dict[str, Path], stage: Path) -> None:
    """Give ``directory`` entries of our own, and leave the rest of it as it is.

    A tmpfs takes its place, with links to what was there; so nothing has to be created in the
    host's directory, and no overlay is needed. ``stage`` is an empty directory to build it in.
    """
    mount("tmpfs", stage, "tmpfs")
    host = stage / ".host"
    host.mkdir()
    mount(directory, host, flags=MS_BIND | MS_REC)
    for name in [each.name for each in directory.iterdir()]:
        if name not in own:
            (stage / name).symlink_to(f".host/{name}")
    for name, source in own.items():
        target = stage / name
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
        mount(source, target, flags=MS_BIND)
    mount(stage, directory, flags=MS_MOVE)
