# SPDX-License-Identifier: Apache-2.0
"""PID 1 of a lab machine: makes it from namespaces, then does what systemd's units would.

Runs ``facts`` and the daemon once there is a token, restarting them as their unit does: unless
the daemon ended well; ``apply`` whenever there is an order or an errand; and keepalived while it
has a configuration. Killing it cuts the machine's power.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from k3sagentd.lab import namespaces
from k3sagentd.lab.keepalived import Keepalived
from k3sagentd.paths import Paths

POLL_S = 0.2
"""systemd's path unit has inotify; here a look at one file name must do."""
RESTART_S = 1.0
PROGRAM = [sys.executable, "-m", "k3sagentd"]


def launch(machine: Path, network: Path, hostname: str) -> int:
    """Start the machine whose files are in ``machine``; returns its PID 1 as seen from here."""
    namespaces.enter_network(network)
    namespaces.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWPID)
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    _redirect(machine / "var/log/init.log")
    try:
        _make(machine, hostname)
        _live(Paths(), machine / "ran")
    except BaseException as error:  # PID 1 has nobody to tell but its log
        print(f"init: {error!r}", file=sys.stderr, flush=True)
    os._exit(0)


def _redirect(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def _make(machine: Path, hostname: str) -> None:
    namespaces.make_private()
    namespaces.mount("proc", "/proc", "proc")
    with contextlib.suppress(OSError):  # a machine without its own /sys has no MACs to show
        namespaces.mount("sysfs", "/sys", "sysfs")
    socket.sethostname(hostname)
    for volatile in ("run/k3sagentd", "run/k3sagentd-apply"):
        shutil.rmtree(machine / volatile, ignore_errors=True)
        (machine / volatile).mkdir()
    stage = machine / "stage"
    for directory in ("etc", "var/lib", "var/log", "usr/local/bin", "run"):
        own = {each.name: each for each in (machine / directory).iterdir()}
        namespaces.compose(Path("/") / directory, own, stage)


def _live(paths: Paths, ran: Path) -> None:
    daemon = _start_daemon() if _has_token(paths) else None
    ran.write_text(f"{time.time()}")
    apply: subprocess.Popen[bytes] | None = None
    restart_at_s: float | None = None
    keepalived = Keepalived(paths)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(POLL_S)
        if apply is not None and apply.poll() is not None:
            apply = None
        asked = (paths.order, paths.errand, paths.forget)
        if apply is None and any(each.exists() for each in asked):
            apply = subprocess.Popen([*PROGRAM, "apply"])
        if daemon is None:
            daemon = _start_daemon() if _has_token(paths) else None
        elif restart_at_s is not None and time.monotonic() >= restart_at_s:
            daemon, restart_at_s = _start_daemon(), None
        elif restart_at_s is None and daemon.poll():
            restart_at_s = time.monotonic() + RESTART_S
        keepalived.look()
        known = {daemon.pid if daemon else 0, apply.pid if apply else 0, keepalived.pid}
        _reap(known)


def _has_token(paths: Paths) -> bool:
    """Its unit's condition: there is a token, or the note of one that was forgotten."""
    return any(paths.token.parent.glob("token*"))


def _start_daemon() -> subprocess.Popen[bytes]:
    """As its unit: root looks at the machine, then the daemon runs."""
    subprocess.run([*PROGRAM, "facts"], check=False)
    return subprocess.Popen([*PROGRAM, "run"])


def _reap(known: set[int]) -> None:
    """Collect orphans; what subprocess watches is left to it."""
    for entry in [each.name for each in Path("/proc").iterdir()]:
        if not entry.isdigit() or int(entry) in known or int(entry) == 1:
            continue
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and fields[1] == "1":
                os.waitpid(int(entry), os.WNOHANG)


if __name__ == "__main__":
    print(launch(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
