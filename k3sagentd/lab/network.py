# SPDX-License-Identifier: Apache-2.0
"""The lab's wire: a bridge in a namespace of its own, one cable for each machine.

Nothing touches the host's network: the lab works, and stays apart, wherever it runs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from k3sagentd.errors import MachineError, UnavailableError

PREFIX = os.environ.get("K3SAGENTD_LAB_PREFIX", "k3sagentd-lab-")
"""Of the names of network namespaces. With this and ``site.directory`` set, labs live side by
side: no two of them share a wire."""
SWITCH = f"{PREFIX}switch"
GATEWAY = "10.77.0.1"
NETNS = Path("/run/netns")


def run(*command: str, stdin: str | None = None) -> str:
    """Run a tool of the system; raises MachineError with what it said."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=30
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"{' '.join(command)}: no end after {error.timeout:.0f} s") from error
    except FileNotFoundError as error:
        raise UnavailableError(f"{command[0]} is missing; make lab installs it") from error
    if done.returncode:
        raise MachineError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def namespace(machine: str) -> str:
    """The name of a machine's network namespace."""
    return PREFIX + machine


def path_of(machine: str) -> Path:
    """Where that namespace can be entered."""
    return NETNS / namespace(machine)


def address_of(number: int) -> str:
    """The address of machine ``number`` (from 1)."""
    return f"10.77.0.{10 + number}"


def make_switch() -> None:
    """The bridge; multicast goes to every port, as on a plain switch."""
    run("ip", "netns", "add", SWITCH)
    run("ip", "-n", SWITCH, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
    run("ip", "-n", SWITCH, "address", "add", f"{GATEWAY}/24", "dev", "br0")
    run("ip", "-n", SWITCH, "link", "set", "br0", "up")


def plug_in(machine: str, number: int) -> None:
    """A namespace with an ``eth0`` on the switch."""
    name = namespace(machine)
    run("ip", "netns", "add", name)
    run("ip", "-n", SWITCH, "link", "add", machine, "type", "veth", "peer", "eth0", "netns", name)
    run("ip", "-n", SWITCH, "link", "set", machine, "master", "br0", "up")
    run("ip", "-n", name, "link", "set", "lo", "up")
    run("ip", "-n", name, "link", "set", "eth0", "address", f"02:00:0a:4d:00:{10 + number:02x}")
    run("ip", "-n", name, "address", "add", f"{address_of(number)}/24", "dev", "eth0")
    run("ip", "-n", name, "link", "set", "eth0", "up")
    run("ip", "-n", name, "route", "add", "default", "via", GATEWAY)


def forget(machine: str) -> None:
    """Remove the addresses that a program added beside the machine's own: they go with its power,
    though its namespace stays."""
    run("ip", "-n", namespace(machine), "-4", "address", "flush", "dev", "eth0", "secondary")


def partition(groups: Sequence[Sequence[str]]) -> None:
    """Cut the wire between the groups; a machine in none of them is alone."""
    rules = []
    for i, group in enumerate(groups):
        others = [name for j, other in enumerate(groups) if j != i for name in other]
        if group and others:
            ours, theirs = ", ".join(group), ", ".join(others)
            rules.append(f"iifname {{ {ours} }} oifname {{ {theirs} }} drop")
    body = "\n    ".join(rules)
    ruleset = (
        "table bridge lab\ndelete table bridge lab\ntable bridge lab {\n  chain forward {\n"
        f"    type filter hook forward priority 0;\n    {body}\n  }}\n}}\n"
    )
    run("ip", "netns", "exec", SWITCH, "nft", "-f", "-", stdin=ruleset)


def heal() -> None:
    """Mend every cut."""
    ruleset = "table bridge lab\ndelete table bridge lab\n"
    run("ip", "netns", "exec", SWITCH, "nft", "-f", "-", stdin=ruleset)


def unplug_all() -> None:
    """Remove every namespace of the lab."""
    for path in sorted(NETNS.glob(f"{PREFIX}*")) if NETNS.exists() else []:
        run("ip", "netns", "delete", path.name)
