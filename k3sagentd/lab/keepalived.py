# SPDX-License-Identifier: Apache-2.0
"""keepalived on a lab machine, as Debian's unit and root's ``systemctl`` would have it.

Started while it has a configuration, told when that changes, stopped when it is gone; not
started again when it ends by itself, because its unit has no ``Restart=``.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from k3sagentd.paths import Paths

LOG = Path("/var/log/keepalived.log")
PROGRAM = ["keepalived", "--dont-fork", "--log-console", "--vrrp"]
"""Only VRRP, as there is no other configuration; its own log, not the host's."""

STOP_S = 10.0


class Keepalived:
    """What runs, and the configuration that it was given."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._process: subprocess.Popen[bytes] | None = None
        self._given: bytes | None = None

    @property
    def pid(self) -> int:
        """Of the one that runs; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def look(self) -> None:
        """Follow the configuration by one step."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        try:
            wanted = self._paths.keepalived.read_bytes()
        except FileNotFoundError:
            wanted = b""
        if wanted == (self._given or b""):
            return
        self._given = wanted
        if self._process is not None and wanted:
            self._process.send_signal(signal.SIGHUP)
        elif self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_S)
        elif wanted:
            with LOG.open("ab") as log:
                self._process = subprocess.Popen(
                    PROGRAM, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
