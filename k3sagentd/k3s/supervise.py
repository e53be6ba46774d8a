# SPDX-License-Identifier: Apache-2.0
"""Keeps a K3s binary running as its own unit would: restarted 5 s after each end (K3S.md 6).

For install method ``exec``: machines without systemd, that is the lab.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.errors import MachineError
from k3sagentd.files import write_atomically
from k3sagentd.k3s import incomplete
from k3sagentd.k3s.data import is_removed
from k3sagentd.paths import Paths

RESTART_S = 5.0
STOP_S = 20.0
LOG_LIMIT_BYTES = 16 * 1024 * 1024
START_TIMEOUT_S = 10.0


def running(paths: Paths, role: ServerOrAgent | None = None) -> bool:
    """Whether a supervisor holds its lock, for a K3s of that role where one is given."""
    found = _holder(paths)
    return found is not None and role in (None, found[1])


def start(paths: Paths, binary: Path, role: ServerOrAgent) -> None:
    """Start a supervisor that outlives us; one that runs already is left alone."""
    if running(paths):
        return
    paths.k3s_log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __name__, str(paths.root), str(binary), str(role)]
    with paths.k3s_log.open("ab") as output:
        # Nothing of the caller's: whoever reads its output would wait for us to end.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not running(paths):
        if time.monotonic() > deadline:
            raise MachineError("the supervisor of K3s did not start")
        time.sleep(0.05)


def stop(paths: Paths) -> None:
    """Stop the supervisor and K3s; returns when both are gone."""
    deadline = time.monotonic() + STOP_S + 10
    while (found := _holder(paths)) is not None:
        pid = found[0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise MachineError(f"the supervisor of K3s (pid {pid}) does not end")
        time.sleep(0.2)


def _holder(paths: Paths) -> tuple[int, str] | None:
    """The supervisor's pid and its K3s's role, if one holds the lock."""
    try:
        with paths.supervisor.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                told = json.load(file)
                return int(told["pid"]), told["role"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


def _supervise(paths: Paths, binary: Path, role: str) -> int:
    paths.root_run.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"pid": os.getpid(), "binary": str(binary), "role": role})
    write_atomically(paths.supervisor, text.encode(), durable=False)
    with paths.supervisor.open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        signal.signal(signal.SIGTERM, _raise_exit)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            if role != ServerOrAgent.SERVER or not is_removed(paths.k3s_data):
                with contextlib.suppress(OSError):
                    incomplete.clear_the_way(paths)
                _run_once(paths.k3s_log, binary, role)
            time.sleep(RESTART_S)


def _raise_exit(number: int, frame: object) -> None:
    raise SystemExit(0)


def _run_once(log: Path, binary: Path, role: str) -> None:
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        log.rename(log.with_name(log.name + ".1"))
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                [str(binary), role],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"k3sagentd: {binary} cannot be run: {error.strerror}\n".encode())
            return
        try:
            code = child.wait()
            output.write(f"k3sagentd: K3s ended with {code}\n".encode())
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    child.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_supervise(Paths(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]))
