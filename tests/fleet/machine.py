# SPDX-License-Identifier: Apache-2.0
"""Debian machines that boot: systemd-nspawn over one base each release, on the lab's wire.

Everything that a machine mounts is in a mount namespace of its own, and each has its own cgroup:
without, machines kill each other's units. What is left at the end is files, and ``take_down``
removes those.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k3sagentd.control import ControlClient
from k3sagentd.errors import K3sagentdError
from k3sagentd.lab import network
from k3sagentd.lab.site import start_time

FLEET = Path(os.environ.get("K3SAGENTD_FLEET", "/var/lib/k3sagentd-fleet"))
CGROUP = f"{network.PREFIX}fleet"
BOOT_TIMEOUT_S = 120.0
UNITS = {"server": "k3s", "agent": "k3s-agent"}
BOOT = r"""
set -eu
mount -t overlay overlay -o lowerdir={base},upperdir={upper},workdir={work} {root}
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/{cgroup}/{name}
echo $$ > /sys/fs/cgroup/{cgroup}/{name}/cgroup.procs
# Entered already here, so that /sys shows the machine's own interface, and so its own hardware.
exec nsenter --net={network} systemd-nspawn --quiet --boot --directory={root} --machine={name} \
    --register=no --keep-unit --resolv-conf=off --timezone=off --link-journal=no \
    --network-namespace-path={network} --capability=CAP_NET_ADMIN \
    --console=pipe --kill-signal=SIGRTMIN+3 {more}
"""
CLEAN = r"""
mount -t cgroup2 cgroup2 /sys/fs/cgroup
[ -d /sys/fs/cgroup/{cgroup} ] || exit 0
echo 1 > /sys/fs/cgroup/{cgroup}/cgroup.kill
while grep -q 'populated 1' /sys/fs/cgroup/{cgroup}/cgroup.events; do sleep 0.1; done
find /sys/fs/cgroup/{cgroup} -depth -type d -exec rmdir {{}} +
"""


@dataclass
class Machine:
    """One machine; its disk is what its overlay keeps."""

    name: str
    number: int
    layers: str
    credentials: dict[str, str] = field(default_factory=dict)
    moved: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        for each in ("upper", "work", "root", "credentials"):
            (self.home / each).mkdir(parents=True, exist_ok=True)
        network.plug_in(self.name, self.number)

    @property
    def home(self) -> Path:
        """All files of this machine."""
        return FLEET / "machines" / self.name

    @property
    def disk(self) -> Path:
        """What differs from the base, seen while it is off."""
        return self.home / "upper"

    @property
    def address(self) -> str:
        """Its address on the wire."""
        return network.address_of(self.number + self.moved)

    def move(self) -> None:
        """Give it another address while it is off, as a DHCP server does that forgot."""
        self.moved += 100
        namespace = network.namespace(self.name)
        network.run("ip", "-n", namespace, "-4", "address", "flush", "dev", "eth0")
        network.run("ip", "-n", namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        network.run("ip", "-n", namespace, "route", "add", "default", "via", network.GATEWAY)

    def put(self, path: str, data: str | bytes, mode: int = 0o644) -> None:
        """Write a file onto its disk while it is off."""
        file = self.disk / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        file.chmod(mode)

    # --- power ------------------------------------------------------------------------------

    def on(self) -> None:
        """Power on; returns at once."""
        assert self.process is None
        more = []
        for name, value in self.credentials.items():
            file = self.home / "credentials" / name
            file.write_text(value)
            more.append(f"--load-credential={name}:{file}")
        script = BOOT.format(
            base=self.layers,
            upper=self.disk,
            work=self.home / "work",
            root=self.home / "root",
            cgroup=CGROUP,
            name=self.name,
            network=network.path_of(self.name),
            more=shlex.join(more),
        )
        with (self.home / "console").open("ab") as console:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def leader(self) -> int | None:
        """PID 1 of the machine as seen from here; None while it is off."""
        if self.process is None:
            return None
        with contextlib.suppress(OSError, IndexError, ValueError):
            pid = self.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in map(int, children):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return child
        return None

    def cut(self) -> None:
        """Cut the power: everything in it dies at once."""
        assert self.process is not None
        leader = self.leader()
        if leader is not None:
            started = start_time(leader)
            os.kill(leader, signal.SIGKILL)
            while start_time(leader) == started:
                time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    # --- inside -----------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, timeout_s: float = 180) -> str:
        """Run a command inside; its output."""
        leader = self.leader()
        assert leader is not None, f"{self.name} is off"
        enter = ["nsenter", "-t", str(leader), "-m", "-u", "-i", "-n", "-p", "-C", "--wdns=/"]
        clean = ["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]
        done = subprocess.run(
            [*enter, *clean, "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
        if check:
            assert done.returncode == 0, f"{self.name}: {command}:\n{done.stdout}"
        return done.stdout

    def put_now(self, path: str, data: str | bytes, mode: int = 0o644) -> None:
        """Write a file while it is on."""
        leader = self.leader()
        assert leader is not None, f"{self.name} is off"
        file = Path(f"/proc/{leader}/root") / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        file.chmod(mode)

    def booted(self) -> "Machine":
        """Wait until its boot is over, well or not."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.leader() is not None:
                said = self.run("systemctl", "is-system-running", check=False).strip()
                if said in ("running", "degraded"):
                    return self
            time.sleep(0.3)
        raise AssertionError(f"{self.name} does not boot:\n{self.console()}")

    def assert_healthy(self) -> None:
        """No unit has failed."""
        said = self.booted().run("systemctl", "is-system-running", check=False).strip()
        if said != "running":
            failed = self.run("systemctl", "--failed", "--no-legend", "--plain").splitlines()
            names = [line.split()[0] for line in failed if line]
            stories = [self.run("systemctl", "status", name, check=False) for name in names]
            raise AssertionError(f"{self.name} is {said}: {' '.join(names)}\n" + "".join(stories))

    def assert_starts_at_boot(self, role: str) -> None:
        """K3s's unit of this role does, the other one does not."""
        for each, unit in UNITS.items():
            said = self.run("systemctl", "is-enabled", unit, check=False).strip()
            assert (said == "enabled") == (each == role), f"{self.name}: {unit} is {said}"

    def console(self) -> str:
        """The end of what it said while booting."""
        return (self.home / "console").read_text(errors="replace")[-3000:]

    async def view(self) -> dict[str, Any] | None:
        """What ``k3sagentd status --json`` would say; None while nobody answers."""
        leader = self.leader()
        if leader is None:
            return None
        path = Path(f"/proc/{leader}/root/run/k3sagentd/control.sock")
        try:
            found: dict[str, Any] = (await ControlClient(path).status())["status"]
        except (K3sagentdError, OSError, ValueError, json.JSONDecodeError):
            return None
        return found


def take_down(machines: list[Machine]) -> None:
    """Cut the power of all, and remove every trace, also of a run that was killed."""
    for machine in machines:
        if machine.process is not None:
            machine.cut()
    clean = CLEAN.format(cgroup=CGROUP)
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", clean]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    for namespace in network.NETNS.glob(f"{network.PREFIX}*"):
        for pid in network.run("ip", "netns", "pids", namespace.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    network.unplug_all()
    shutil.rmtree(FLEET / "machines", ignore_errors=True)


if __name__ == "__main__":
    take_down([])
    shutil.rmtree(FLEET, ignore_errors=True)
