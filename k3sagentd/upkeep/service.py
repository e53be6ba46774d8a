# SPDX-License-Identifier: Apache-2.0
"""The daemon as an operator's command needs it: stopped, with systemd or without."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time

from k3sagentd.config import Config
from k3sagentd.errors import MachineError
from k3sagentd.files import fsync_directory, write_atomically
from k3sagentd.k3s.install import run
from k3sagentd.paths import Paths

UNIT = "k3sagentd.service"
SYSTEMCTL_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


def has_systemd(paths: Paths, config: Config) -> bool:
    """Whether systemd runs this machine (sd_booted(3)); method ``exec`` is for where it does not.

    A lab's machine sees the /run of its host.
    """
    return config.install.method != "exec" and (paths.root / "run/systemd/system").is_dir()


def systemctl(*arguments: str) -> None:
    """Run it; raises MachineError."""
    run(["systemctl", *arguments], timeout_s=SYSTEMCTL_TIMEOUT_S, what="systemctl")


def pid(paths: Paths) -> int | None:
    """Who listens at the control socket (SO_PEERCRED, unix(7)); None where nobody does."""
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(str(paths.control))
        except OSError:
            return None
        credentials = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    found: int = struct.unpack("3i", credentials)[0]
    return found


def stop(paths: Paths, config: Config) -> None:
    """Stop the daemon, and return when it is gone; raises MachineError."""
    if has_systemd(paths, config):
        systemctl("stop", UNIT)
        return
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (found := pid(paths)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise MachineError(f"the daemon (pid {found}) does not end")
        time.sleep(0.1)


def mark(paths: Paths, why: str) -> None:
    """From here on the daemon does not run on this machine."""
    paths.left.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_atomically(paths.left, f"{why}\n".encode())


def unmark(paths: Paths) -> None:
    """The daemon may run again."""
    paths.left.unlink(missing_ok=True)
    fsync_directory(paths.left.parent)
