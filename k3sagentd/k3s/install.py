# SPDX-License-Identifier: Apache-2.0
"""How K3s comes onto the machine, is started and stopped: method ``script`` and method ``exec``.

The install script is downloaded to a file, checked, and run without starting anything; its
contract is its documented environment (K3S.md 6). It never sees a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Protocol

from k3sagentd import systemd
from k3sagentd.config import Config
from k3sagentd.core.k3s import Order, ServerOrAgent
from k3sagentd.errors import ConfigError, MachineError
from k3sagentd.k3s import supervise, units
from k3sagentd.k3s.trust import NO_ANSWER
from k3sagentd.k3s.units import STANDARD
from k3sagentd.paths import Paths

SCRIPT_LIMIT_BYTES = 4 * 1024 * 1024
DOWNLOAD_TIMEOUT_S = 60.0
INSTALL_TIMEOUT_S = 1800.0
SYSTEMCTL_TIMEOUT_S = 180.0
VERSION_TIMEOUT_S = 60.0
"""The binary unpacks itself at its first run, onto an SD card."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin"


class Method(Protocol):
    """One way to have K3s."""

    starts_at_boot: bool
    """Whether somebody else starts with the machine what was started once."""

    def installed(self, role: ServerOrAgent) -> bool:
        """Whether there is something to start."""

    def install(self, order: Order) -> None:
        """Make K3s startable, without starting it; raises MachineError."""

    def running(self) -> bool:
        """Whether it was started and not stopped."""

    def start(self, role: ServerOrAgent, *, at_boot: bool = True) -> None:
        """Start it now, and at every boot (or leave that as it is), without waiting for it."""

    def restart(self, role: ServerOrAgent) -> None:
        """Start it again, with what its configuration says now."""

    def stop(self) -> None:
        """Stop it and what it runs, now and at every boot."""

    def halt(self) -> None:
        """Stop it for now; returns when it is gone. What it runs goes on."""

    def version(self) -> str | None:
        """The first line of ``k3s --version``; None where there is none."""


def method(config: Config, paths: Paths) -> Method:
    """The method that is configured; raises ConfigError.

    What ``exec`` starts would end with the unit that started it.
    """
    if config.install.method == "exec":
        if systemd.is_unit():
            raise ConfigError(
                f"{paths.config}: install.method is exec; allowed where systemd runs: script (a "
                "file of yours may set INSTALL_K3S_SKIP_DOWNLOAD=true for a binary that is here)"
            )
        return Exec(config.install.binary, paths)
    return Script(config, paths)


class Exec:
    """A K3s binary that is here already, kept running by a supervisor of ours."""

    starts_at_boot = False

    def __init__(self, binary: Path, paths: Paths) -> None:
        self._binary = binary
        self._paths = paths

    def installed(self, role: ServerOrAgent) -> bool:
        """Whether the binary is there."""
        return os.access(self._binary, os.X_OK)

    def install(self, order: Order) -> None:
        """Nothing but a look."""
        if not self.installed(order.role):
            raise MachineError(f"{self._binary} is not executable; put a K3s binary there")

    def running(self) -> bool:
        """Whether the supervisor is there."""
        return supervise.running(self._paths)

    def start(self, role: ServerOrAgent, *, at_boot: bool = True) -> None:
        """Start the supervisor; at a boot it is our orders that start K3s."""
        supervise.start(self._paths, self._binary, role)

    def restart(self, role: ServerOrAgent) -> None:
        """Stop it and start it."""
        self.stop()
        self.start(role)

    def stop(self) -> None:
        """Stop the supervisor and its K3s."""
        supervise.stop(self._paths)

    def halt(self) -> None:
        """Stop the supervisor and its K3s."""
        supervise.stop(self._paths)

    def version(self) -> str | None:
        """As the binary says."""
        return _version(self._binary)


class Script:
    """The K3s install script and the units that it makes."""

    starts_at_boot = True

    def __init__(self, config: Config, paths: Paths) -> None:
        self._install = config.install
        self._paths = paths

    def installed(self, role: ServerOrAgent) -> bool:
        """Whether unit and binary are there, of whatever release: upgrades are not ours."""
        binary = self._paths.root / "usr/local/bin/k3s"
        return self._has_unit(role) and os.access(binary, os.X_OK)

    def install(self, order: Order) -> None:
        """Run the script, unless what it would make is here already."""
        with tempfile.TemporaryDirectory(prefix="k3sagentd-") as directory:
            script = Path(directory, "install.sh")
            script.write_bytes(self._script())
            environment = self._environment(order)
            run(
                ["/bin/sh", str(script), str(order.role)],
                timeout_s=INSTALL_TIMEOUT_S,
                environment=environment,
                what="the install script",
            )
        unit = self._paths.root / "etc/systemd/system" / STANDARD[order.role]
        if not unit.exists():
            raise MachineError(f"the install script ended well but made no {unit}")

    def _environment(self, order: Order) -> dict[str, str]:
        environment = {
            "PATH": PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "INSTALL_K3S_SKIP_START": "true",
            "INSTALL_K3S_SKIP_ENABLE": "true",
        }
        version = order.k3s_version or self._install.version
        if version:
            environment["INSTALL_K3S_VERSION"] = version
        else:
            environment["INSTALL_K3S_CHANNEL"] = self._install.channel
        for name in ("http_proxy", "https_proxy", "no_proxy"):
            if value := os.environ.get(name) or os.environ.get(name.upper()):
                environment[name] = value
        return environment

    def _script(self) -> bytes:
        source = self._install.script
        url = source if "://" in source else Path(source).as_uri()
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:  # noqa: S310
                if not response.geturl().startswith(("https://", "file://")):
                    raise MachineError(f"{source} leads to {response.geturl()}, which is not https")
                data: bytes = response.read(SCRIPT_LIMIT_BYTES + 1)
        except NO_ANSWER as error:
            reason = getattr(error, "reason", error)
            raise MachineError(f"cannot download {source}: {reason}") from error
        if not 0 < len(data) <= SCRIPT_LIMIT_BYTES:
            raise MachineError(f"{source} has {len(data)} bytes; that is no install script")
        found, wanted = hashlib.sha256(data).hexdigest(), self._install.script_sha256
        if wanted is not None and found != wanted:
            raise MachineError(f"{source} has SHA-256 {found}, but script-sha256 is {wanted}")
        return data

    def running(self) -> bool:
        """Whether one of the units is active or on its way."""
        return _are_active([*STANDARD.values(), *units.find(self._paths)])

    def start(self, role: ServerOrAgent, *, at_boot: bool = True) -> None:
        """Enable and start; a start that blocks (K3S.md 6) is not waited for, and of what runs
        already it is none.

        The other role's unit is stopped and disabled: two of them would fight for one machine.
        Where the boot is left as it is, it is the unit that is there, by whatever name.
        """
        _systemctl("daemon-reload")
        if not at_boot:
            _systemctl("start", "--no-block", units.name_of(self._paths, role))
            return
        other = next(each for each in ServerOrAgent if each is not role)
        if self._has_unit(other):
            _systemctl("disable", "--now", STANDARD[other])
        _systemctl("enable", STANDARD[role])
        _systemctl("start", "--no-block", STANDARD[role])

    def restart(self, role: ServerOrAgent) -> None:
        """Restart the unit."""
        _systemctl("enable", STANDARD[role])
        _systemctl("restart", "--no-block", STANDARD[role])

    def stop(self) -> None:
        """Disable and stop every unit that runs K3s, by whatever name."""
        for unit in units.find(self._paths):
            _systemctl("disable", "--now", unit)
            # How it ended does not degrade the system; who is not loaded has not failed.
            with contextlib.suppress(MachineError):
                _systemctl("reset-failed", unit)
        for killall in units.programs(self._paths, "k3s-killall.sh"):
            run([str(killall)], timeout_s=SYSTEMCTL_TIMEOUT_S, what="k3s-killall.sh")

    def halt(self) -> None:
        """Stop the server's unit; its containers outlive it (KillMode=process)."""
        _systemctl("stop", units.name_of(self._paths, ServerOrAgent.SERVER))

    def version(self) -> str | None:
        """As the binary says, wherever the install script put it."""
        found = shutil.which("k3s", path=PATH)
        return _version(Path(found)) if found else None

    def _has_unit(self, role: ServerOrAgent) -> bool:
        return (self._paths.root / "etc/systemd/system" / STANDARD[role]).exists()


def _are_active(names: list[str]) -> bool:
    """Whether one of the units is active or on its way; raises MachineError."""
    try:
        said = subprocess.run(
            ["systemctl", "is-active", *dict.fromkeys(names)],
            capture_output=True,
            text=True,
            check=False,
            timeout=SYSTEMCTL_TIMEOUT_S,
        ).stdout
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"systemctl took longer than {SYSTEMCTL_TIMEOUT_S:.0f} s") from error
    return any(state in ("active", "activating", "reloading") for state in said.split())


def _version(binary: Path) -> str | None:
    try:
        done = subprocess.run(
            [str(binary), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0][:200] or None


def _systemctl(*arguments: str) -> None:
    run(["systemctl", *arguments], timeout_s=SYSTEMCTL_TIMEOUT_S, what="systemctl")


def run(
    command: list[str], *, timeout_s: float, what: str, environment: dict[str, str] | None = None
) -> None:
    """Run to the end; raises MachineError with the last line that it said."""
    try:
        done = subprocess.run(
            command,
            env=environment or {"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"{what} took longer than {timeout_s:.0f} s") from error
    except OSError as error:
        raise MachineError(f"{what} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = lines[-1][:300] if lines else "it said nothing"
        raise MachineError(f"{what} ended with {done.returncode}: {said}")
