# SPDX-License-Identifier: Apache-2.0
"""What is mounted in a directory: a disk for K3s, or for etcd alone, as K3s's documentation
recommends (docs.k3s.io, resource profiling)."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
"""proc_pid_mountinfo(5)."""
CONTAINERD = "containerd"
"""In the agent's part of K3s's data. What is mounted below it belongs to a container, goes with it,
and comes back with no boot."""


def mount_points(path: Path) -> frozenset[Path]:
    """``path``, if something is mounted there, and the mount points below.

    None for a symbolic link, which is no more than a name. Raises OSError.
    """
    if path.is_symlink():
        return frozenset()
    real = path.parent.resolve() / path.name
    found = set()
    for line in MOUNTINFO.read_text(errors="surrogateescape").splitlines():
        point = Path(_plain(line.split()[4]))
        if real in (point, *point.parents):
            below = point.relative_to(real)
            if CONTAINERD not in below.parts[:-1]:
                found.add(path / below)
    return frozenset(found)


def _plain(text: str) -> str:
    """Without the escapes of spaces and the like, three octal digits each."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
