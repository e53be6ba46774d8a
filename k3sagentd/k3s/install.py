# SPDX-License-Identifier: Apache-2.0
"""How K3s comes onto the machine, is started and stopped: method ``script`` and method ``exec``.

The install script is downloaded to a file, checked, and run without starting anything; its
contract is its documented environment (K3S.md 6). It never sees a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Protocol

from k3sagentd import systemd
from k3sagentd.config import Config
from k3sagentd.core.k3s import Action, Datastore, Order, ServerOrAgent
from k3sagentd.errors import ConfigError, MachineError
from k3sagentd.files import write_atomically
from k3sagentd.k3s import supervise, units
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.trust import no_http
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

    def owe_start(self, role: ServerOrAgent) -> None:
        """Note, also over a power cut, that we stop in ``role`` what was to run."""

    def owes_start(self, role: ServerOrAgent) -> bool:
        """Whether it was we who left it stopped in ``role``, and not to start at boot."""

    def install(self, order: Order) -> None:
        """Make K3s startable, without starting it; raises MachineError."""

    def running(self, role: ServerOrAgent | None = None) -> bool:
        """Whether it was started, in ``role`` where one is given, and not stopped."""

    def start(self, role: ServerOrAgent, *, at_boot: bool = True) -> None:
        """Start it now, and at every boot (or leave that as it is), without waiting for it; what
        runs already goes on."""

    def restart(self, role: ServerOrAgent) -> None:
        """Start it again, with what its configuration says now; at a boot as before."""

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

    def owe_start(self, role: ServerOrAgent) -> None:
        """Nothing: each order starts it."""

    def owes_start(self, role: ServerOrAgent) -> bool:
        """Never: nothing starts it at a boot but our orders."""
        return False

    def install(self, order: Order) -> None:
        """Nothing but a look."""
        if not self.installed(order.role):
            raise MachineError(f"{self._binary} is not executable; put a K3s binary there")

    def running(self, role: ServerOrAgent | None = None) -> bool:
        """Whether the supervisor is there."""
        return supervise.running(self._paths, role)

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
    """The K3s install script and the units that it makes.

    The script disables its unit, makes it anew, and as we run it leaves it disabled; and a change
    of role stops the unit of the old one. So from there to the start that enables one of them a
    start is owed, also over a power cut.
    """

    starts_at_boot = True

    def __init__(self, config: Config, paths: Paths) -> None:
        self._install = config.install
        self._paths = paths

    def installed(self, role: ServerOrAgent) -> bool:
        """Whether unit and binary are there, of whatever release: upgrades are not ours."""
        return self._has_unit(role) and self._binary() is not None

    def owes_start(self, role: ServerOrAgent) -> bool:
        """Whether the script made the unit, or we stopped it, and none was started since."""
        return role in self._owed()

    def owe_start(self, role: ServerOrAgent) -> None:
        """Add it to those that are owed: an agent stays one until it is a server."""
        self._paths.unstarted.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        owed = sorted({*self._owed(), role})
        write_atomically(self._paths.unstarted, f"{' '.join(owed)}\n".encode())

    def _owed(self) -> list[str]:
        try:
            return self._paths.unstarted.read_text().split()
        except FileNotFoundError:
            return []

    def install(self, order: Order) -> None:
        """Run the script, unless K3s runs here already as the order wants it."""
        fits = self._fits(order)
        runs = self.installed(order.role) and self._is_active(order.role)
        if fits and runs:
            return
        keeps = fits and self._is_kept(order)
        with tempfile.TemporaryDirectory(prefix="k3sagentd-") as directory:
            script = Path(directory, "install.sh")
            script.write_bytes(self._script())
            self.owe_start(order.role)
            if runs and not keeps:
                self._paths.restart.touch()
            run(
                ["/bin/sh", str(script), str(order.role)],
                timeout_s=INSTALL_TIMEOUT_S,
                environment=self._environment(order, keeps=keeps),
                what="the install script",
            )
        if not self._has_unit(order.role):
            unit = self._paths.root / "etc/systemd/system" / STANDARD[order.role]
            raise MachineError(f"the install script ended well but made no {unit}")

    def _fits(self, order: Order) -> bool:
        """Whether the binary that is here runs, and is of the release that is asked for, if one
        is; what was installed once is of the right one until a join says otherwise."""
        binary = self._binary()
        said = _version(binary) if binary is not None else None
        begins = order.action is Action.INIT and not self._has_data()
        asked = order.k3s_version or (self._install.version if begins else None)
        return said is not None and (asked is None or asked in said.split())

    def _is_kept(self, order: Order) -> bool:
        """Whether a binary that fits is the one that this machine has run, and must not become
        another by the way: an agent that prepares to be a server, data whose unit is gone."""
        sealed = order.action is not Action.INIT
        had = self._has_data() or (sealed and any(map(self._has_unit, ServerOrAgent)))
        return had and order.k3s_version is None

    def _has_data(self) -> bool:
        return datastore(self._paths.k3s_data) is not Datastore.NONE

    def _environment(self, order: Order, *, keeps: bool) -> dict[str, str]:
        environment = {
            "PATH": PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "INSTALL_K3S_SKIP_START": "true",
            "INSTALL_K3S_SKIP_ENABLE": "true",
        }
        binary = self._binary()
        version = order.k3s_version or self._install.version
        if keeps and binary is not None:
            environment["INSTALL_K3S_SKIP_DOWNLOAD"] = "true"
            environment["INSTALL_K3S_BIN_DIR"] = str(binary.parent)
        elif version:
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
        except OSError as error:  # urllib's own are
            reason = getattr(error, "reason", error)
            raise MachineError(f"cannot download {source}: {reason}") from error
        except http.client.HTTPException as error:
            raise MachineError(f"cannot download {source}: {no_http(error)}") from error
        if not 0 < len(data) <= SCRIPT_LIMIT_BYTES:
            raise MachineError(f"{source} has {len(data)} bytes; that is no install script")
        found, wanted = hashlib.sha256(data).hexdigest(), self._install.script_sha256
        if wanted is not None and found != wanted:
            raise MachineError(f"{source} has SHA-256 {found}, but script-sha256 is {wanted}")
        return data

    def running(self, role: ServerOrAgent | None = None) -> bool:
        """Whether one of the units is active or on its way."""
        found = {name: each for each, name in STANDARD.items()} | units.find(self._paths)
        return _are_active([name for name, each in found.items() if role in (None, each)])

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
        self._paths.unstarted.unlink(missing_ok=True)

    def restart(self, role: ServerOrAgent) -> None:
        """Restart the unit; whether it starts at boot stays as it is."""
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
        """An empty file is what a power cut left of one."""
        unit = self._paths.root / "etc/systemd/system" / STANDARD[role]
        return unit.exists() and unit.stat().st_size > 0

    def _is_active(self, role: ServerOrAgent) -> bool:
        return _are_active([STANDARD[role]])

    def _binary(self) -> Path | None:
        found = units.programs(self._paths, "k3s")
        return next((each for each in found if os.access(each, os.X_OK)), None)


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
