# SPDX-License-Identifier: Apache-2.0
"""What K3s needs of the machine, looked at before it is installed: K3s would fail on it later,
less clearly, or, with a wrong clock, would make certificates that stay wrong (K3S.md 9)."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from k3sagentd.config import Config
from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.discovery.addresses import attachment
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.files import write_atomically
from k3sagentd.k3s import units
from k3sagentd.k3s.clock import Clock, settle
from k3sagentd.k3s.data import datastore
from k3sagentd.paths import Paths

MEMORY_WORD = "cgroup_enable=memory"
MEMORY_MINIMUM_MIB = {ServerOrAgent.SERVER: 900, ServerOrAgent.AGENT: 350}
"""Of all memory as Linux counts it: a machine sold with 1 GB, and one with 512 MB."""
DISK_MINIMUM_MIB = {ServerOrAgent.SERVER: 2048, ServerOrAgent.AGENT: 1024}
"""Free where K3s's data will be: the binary unpacked, the system's images, etcd."""
TCP_PORTS = {ServerOrAgent.SERVER: (6443, 2379, 2380, 10250), ServerOrAgent.AGENT: (10250,)}
VXLAN_PORT = 8472


def preflight(
    config: Config, paths: Paths, role: ServerOrAgent, clock: Clock | None
) -> Iterator[str]:
    """Look at one thing after the other, yielding what is waited for, if anything.

    ``clock`` is None where K3s runs already, and the time must not jump. Raises MachineError where
    it may be better soon, HopelessError where a person is needed.
    """
    if attachment(config.interface, config.virtual_ip) is None:
        where = config.interface or "any interface with a default route"
        raise MachineError(f"there is no address on {where}")
    checks: dict[str, Callable[[], None]] = {
        "foreign": lambda: check_foreign(config, paths),
        "cgroup": lambda: check_cgroup(config, paths),
        "memory": lambda: check_memory(paths, role),
        "disk": lambda: check_disk(paths, role),
        "ports": lambda: check_ports(paths, role),
    }
    for name, check in checks.items():
        if name not in config.ignore_preflight:
            check()
    if clock is not None and "clock" not in config.ignore_preflight:
        yield from settle(paths, clock)


def check_foreign(config: Config, paths: Paths) -> None:
    """A K3s that we did not install and that has no data: what it is for, we cannot know."""
    if config.install.method != "script":
        return
    if paths.installed.exists() or datastore(paths.k3s_data) is not Datastore.NONE:
        return
    found = units.find(paths)
    for unit in units.named(paths):
        if unit.name in found:
            raise HopelessError(
                f"K3s was installed here by somebody else ({unit}) and has no data; uninstall it "
                "(k3s-uninstall.sh or k3s-agent-uninstall.sh)"
            )


def check_memory(paths: Paths, role: ServerOrAgent) -> None:
    """Enough memory for K3s in ``role``."""
    try:
        lines = (paths.root / "proc/meminfo").read_text().splitlines()
        total_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return
    found, least = total_kib // 1024, MEMORY_MINIMUM_MIB[role]
    if found < least:
        raise HopelessError(
            f"this machine has {found} MiB of memory; a K3s {role} needs {least} MiB"
        )


def check_disk(paths: Paths, role: ServerOrAgent) -> None:
    """Enough room for K3s in ``role``."""
    data = paths.k3s_data
    directory = next(path for path in (data, *data.parents) if path.is_dir())
    found, least = shutil.disk_usage(directory).free // 2**20, DISK_MINIMUM_MIB[role]
    if found < least and _begins(paths, role):
        raise MachineError(
            f"{found} MiB are free below {directory}; a K3s {role} needs {least} MiB to begin with"
        )


def check_ports(paths: Paths, role: ServerOrAgent) -> None:
    """The ports that K3s will listen on are free; who has K3s's data may have K3s running."""
    if not _begins(paths, role):
        return
    wanted = [("tcp", port) for port in TCP_PORTS[role]] + [("udp", VXLAN_PORT)]
    if datastore(paths.k3s_data) is Datastore.AGENT:
        # The agent that is to become a server runs: its ports are its own.
        wanted = [
            ("tcp", port) for port in TCP_PORTS[role] if port not in TCP_PORTS[ServerOrAgent.AGENT]
        ]
    taken = [f"{port}/{kind}" for kind, port in wanted if not _is_free(kind, port)]
    if taken:
        some = taken[0].partition("/")[0]
        raise MachineError(
            f"in use already, but needed by K3s: {', '.join(taken)}; "
            f"ss -lnptu 'sport = :{some}' names the program"
        )


def _begins(paths: Paths, role: ServerOrAgent) -> bool:
    """Whether K3s is new here in this role."""
    store = datastore(paths.k3s_data)
    return store is Datastore.NONE or (store is Datastore.AGENT and role is ServerOrAgent.SERVER)


def _is_free(kind: str, port: int) -> bool:
    stream = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
        try:
            with socket.socket(family, stream) as one:
                if kind == "tcp":  # what only lingers after a connection is no listener
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
    return True


def check_cgroup(config: Config, paths: Paths) -> None:
    """The memory cgroup, which the Raspberry Pi's firmware turns off.

    ``cgroup.controllers`` tells, not /proc/cgroups, which does not know cgroup v2.
    """
    controllers = paths.root / "sys/fs/cgroup/cgroup.controllers"
    try:
        is_on = "memory" in controllers.read_text().split()
    except OSError:
        return
    stamp = paths.root_state / "rebooted-for-cgroup"
    if is_on:
        stamp.unlink(missing_ok=True)
        return
    off = f"the memory cgroup is off ({controllers})"
    file = next((path for path in paths.cmdlines if path.is_file()), None)
    if file is None:
        raise HopelessError(f"{off}; boot the kernel with {MEMORY_WORD}")
    line = file.read_text().strip()
    if MEMORY_WORD not in line.split():
        if not config.fix_cmdline:
            raise HopelessError(
                f"{off}; add {MEMORY_WORD} to the one line of {file} and reboot, or set "
                "fix-cmdline: true"
            )
        if "\n" in line:
            raise HopelessError(f"{off}; {file} has more than one line; add {MEMORY_WORD} by hand")
        write_atomically(file, f"{line} {MEMORY_WORD}\n".encode(), mode=0o755)
    _reboot(config, stamp, f"{off}; {MEMORY_WORD} is in {file} now")


def _reboot(config: Config, stamp: Path, why: str) -> None:
    if stamp.exists():
        raise HopelessError(f"{why}, and was at the last boot: the kernel does not heed it")
    if not config.allow_reboot:
        raise HopelessError(f"{why}; reboot this machine, or set allow-reboot: true")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(stamp, why.encode())
    os.sync()
    subprocess.run(["systemctl", "reboot"], check=False, timeout=60)
    raise MachineError(f"{why}; this machine reboots")
