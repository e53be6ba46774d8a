# SPDX-License-Identifier: Apache-2.0
"""The lab's machines and where their files are: made, started, cut off, taken down."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from k3sagentd import site_token
from k3sagentd.errors import MachineError, PermissionDeniedError, UnavailableError, UsageError
from k3sagentd.files import write_atomically
from k3sagentd.lab import network

MACHINES_LIMIT = 100
KILL_TIMEOUT_S = 180.0
BOOT_TIMEOUT_S = 180.0
DIRECTORIES = (
    "etc/k3sagentd",
    "etc/keepalived",
    "etc/rancher",
    "var/lib/k3sagentd",
    "var/lib/k3sagentd-apply",
    "var/lib/rancher",
    "var/log",
    "usr/local/bin",
    "run/k3sagentd",
    "run/k3sagentd-apply",
    "stage",
)


def directory() -> Path:
    """Where the lab lives."""
    return Path(os.environ.get("K3SAGENTD_LAB", "/var/lib/k3sagentd-lab"))


@dataclass(slots=True)
class Lab:
    """What the lab is, as kept in ``lab.json``."""

    nodes: int
    token: str
    servers: int | None = None
    k3s: str | None = None
    k3s_arguments: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    machines: dict[str, int] = field(default_factory=dict)
    """Number of each machine, by name."""
    owner: str | None = None
    """Pid and start time of the command that takes it down at its end, if there is one."""

    @property
    def root(self) -> Path:
        """The lab's directory."""
        return directory()

    def machine(self, name: str) -> Path:
        """A machine's files; raises UsageError for one that does not exist."""
        if name not in self.machines:
            known = ", ".join(self.machines) or "none"
            raise UsageError(f"there is no machine {name}; there are: {known}")
        return self.root / "nodes" / name

    def control(self, name: str) -> Path:
        """The control socket of a machine's daemon."""
        return self.machine(name) / "run/k3sagentd/control.sock"

    def save(self) -> None:
        """Keep it for the next command."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(self.root / "lab.json", json.dumps(asdict(self), indent=1).encode())

    # --- machines ---------------------------------------------------------------------------

    def add(self, *, role: str | None = None, hostname: str | None = None, **other: Any) -> str:
        """One more machine, configured but without power; returns its name.

        With ``token=None`` its daemon does not start before ``give_token``.
        """
        number = max(self.machines.values(), default=0) + 1
        if number > MACHINES_LIMIT:
            raise UsageError(f"a lab has at most {MACHINES_LIMIT} machines")
        name = f"node{number}"
        self.machines[name] = number
        self.save()
        machine = self.machine(name)
        for each in DIRECTORIES:
            (machine / each).mkdir(parents=True, exist_ok=True)
        (machine / "etc/hostname").write_text(f"{hostname or name}\n")
        (machine / "etc/machine-id").write_text(f"{secrets.token_hex(16)}\n")
        config: dict[str, Any] = {
            "nodes": self.nodes,
            "install": {"method": "exec"},
            # The clock is the host's, and must stay as it is.
            "ignore-preflight": ["clock"],
        }
        if self.servers is not None:
            config["servers"] = self.servers
        if role is not None:
            config["role"] = role
        config |= self.settings | other
        token = config.pop("token", self.token)
        (machine / "etc/k3sagentd/config.yaml").write_text(yaml.safe_dump(config))
        if token is not None:
            self.give_token(name, token)
        if self.knobs:
            (machine / "etc/k3s-standin.yaml").write_text(yaml.safe_dump(self.knobs))
        for log in ("k3s.log", "keepalived.log"):
            (machine / "var/log" / log).touch()
        self._put_k3s(machine / "usr/local/bin/k3s")
        network.plug_in(name, number)
        return name

    def give_token(self, name: str, token: str | None = None) -> None:
        """What a machine that was not configured waits for: the lab's token, or another."""
        file = self.machine(name) / "etc/k3sagentd/token"
        write_atomically(file, f"{token or self.token}\n".encode(), mode=0o600)

    def _put_k3s(self, path: Path) -> None:
        """A ``k3s`` that is the stand-in, or the real one with its further arguments."""
        if self.k3s is None:
            # Root's programs are run without the environment that a checkout needs.
            package = Path(__file__).resolve().parents[2]
            command = f'env PYTHONPATH={package} {sys.executable} -m k3sagentd.lab.standin "$@"'
        else:
            command = " ".join([self.k3s, '"$@"', *self.k3s_arguments])
        path.write_text(f"#!/bin/sh\nexec {command}\n")
        path.chmod(0o755)

    def start(self, name: str) -> None:
        """Power on; returns once it has booted, that is: once its daemon was started."""
        machine = self.machine(name)
        if self.pid(name) is not None:
            raise UsageError(f"{name} is on already")
        hostname = (machine / "etc/hostname").read_text().strip()
        (machine / "ran").unlink(missing_ok=True)
        package = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(package)}
        command = [sys.executable, "-m", "k3sagentd.lab.init"]
        done = subprocess.run(
            [*command, str(machine), str(network.path_of(name)), hostname],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd="/",
        )
        if done.returncode:
            raise MachineError(f"{name} does not start: {done.stderr.strip().splitlines()[-1:]}")
        pid = int(done.stdout)
        (machine / "pid").write_text(f"{pid} {start_time(pid)}")
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not (machine / "ran").exists():
            if self.pid(name) is None or time.monotonic() > deadline:
                raise MachineError(f"{name} does not boot; see {machine}/var/log/init.log")
            time.sleep(0.01)

    def pid(self, name: str) -> int | None:
        """PID 1 of a machine that is on, as seen from here."""
        try:
            pid, started = (self.machine(name) / "pid").read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if start_time(int(pid)) == started else None

    def kill(self, name: str) -> None:
        """Cut the power: everything in it dies at once."""
        pid = self.pid(name)
        if pid is None:
            raise UsageError(f"{name} is off already")
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while self.pid(name) is not None:
            if time.monotonic() > deadline:
                raise MachineError(f"{name} does not go off")
            time.sleep(0.02)
        network.forget(name)
        (self.machine(name) / "run/k3sagentd/control.sock").unlink(missing_ok=True)

    def command_in(self, name: str, command: list[str]) -> list[str]:
        """The command line that runs ``command`` inside a machine."""
        pid = self.pid(name)
        if pid is None:
            raise UnavailableError(f"{name} is off; k3sagentd lab start {name}")
        package = Path(__file__).resolve().parents[2]
        enter = ["nsenter", "-t", str(pid), "--mount", "--uts", "--net", "--pid", "--wdns=/"]
        return [*enter, "env", f"PYTHONPATH={package}", *command]

    def started_at(self) -> float | None:
        """Unix time at which the last daemon was started; None while one was not."""
        times = []
        for name in self.machines:
            try:
                times.append(float((self.machine(name) / "ran").read_text()))
            except (FileNotFoundError, ValueError):
                return None
        return max(times)


def start_time(pid: int) -> str | None:
    """Clock ticks since boot at which ``pid`` began; None for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def need_root() -> None:
    """Namespaces are made by root."""
    if os.geteuid() != 0:
        raise PermissionDeniedError("the lab makes network namespaces; run it as root")


def load() -> Lab:
    """The lab that is up; raises UnavailableError."""
    need_root()
    try:
        return Lab(**json.loads((directory() / "lab.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        raise UnavailableError("no lab is up; k3sagentd lab up --nodes 5") from None


def create(lab: Lab, *, owned: bool) -> None:
    """Make the wire for a new lab, after whatever a crash left; raises UsageError if one is up."""
    need_root()
    with contextlib.suppress(UnavailableError):
        before = load()
        owner = (before.owner or " ").split(" ")
        orphan = before.owner and start_time(int(owner[0])) != owner[1]
        if not orphan and any(before.pid(name) for name in before.machines):
            raise UsageError("a lab is up already; k3sagentd lab down")
    down()
    if owned:
        lab.owner = f"{os.getpid()} {start_time(os.getpid())}"
    if not lab.token:
        lab.token = site_token.generate()
    lab.save()
    network.make_switch()


def down() -> None:
    """Take everything down, also what a crash left; nothing stays."""
    need_root()
    with contextlib.suppress(UnavailableError):
        lab = load()
        for name in lab.machines:
            if lab.pid(name) is not None:
                lab.kill(name)
    network.unplug_all()
    shutil.rmtree(directory(), ignore_errors=True)
