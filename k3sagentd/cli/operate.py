# SPDX-License-Identifier: Apache-2.0
"""Commands by which an operator changes a machine: they say what they do, and ask before."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

from k3sagentd.config import load_config
from k3sagentd.control import ControlClient
from k3sagentd.discovery.addresses import attachment
from k3sagentd.errors import UsageError
from k3sagentd.k3s import underway
from k3sagentd.paths import Paths
from k3sagentd.upkeep import leave as leaving
from k3sagentd.upkeep import repair as repairing
from k3sagentd.upkeep import reset as resetting
from k3sagentd.upkeep import service

FORCE = """\
This machine starts a new, empty cluster: you decide instead of a quorum. If the old cluster, or
another machine that starts one, is alive after all, there are two clusters for good. Machines that
hold data of an old cluster stay in conflict until k3sagentd reset; all others follow this one."""


def say(text: str) -> None:
    """One step, before it is done."""
    print(f"- {text}", flush=True)


def confirm(text: str, *, yes: bool) -> None:
    """Show ``text`` and return if the operator agrees; raises UsageError."""
    print(text, flush=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask at; --yes says that it is meant")
    try:
        answer = input("Go on? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("not confirmed; nothing was done")


class _Daemon:
    """This machine's daemon, for commands that wait for each of its answers."""

    def __init__(self, paths: Paths) -> None:
        self._client = ControlClient(paths.control)

    def status(self) -> Mapping[str, Any]:
        """What it says now; raises K3sagentdError."""
        status: Mapping[str, Any] = asyncio.run(self._client.status())["status"]
        return status

    def reread(self) -> None:
        """Have it take in the facts that root wrote; raises K3sagentdError."""
        asyncio.run(self._client.reread())


def force(paths: Paths, *, yes: bool) -> int:
    """``k3sagentd cluster-init --force``."""
    confirm(FORCE, yes=yes)
    asyncio.run(ControlClient(paths.control).force())
    print("this node starts the cluster; how far it is: k3sagentd status")
    return 0


def reset(paths: Paths, *, yes: bool) -> int:
    """``k3sagentd reset``."""
    config = load_config(paths)
    if not service.has_systemd(paths, config) and service.pid(paths) is not None:
        raise UsageError("the daemon runs; stop it first (kill, or the supervisor that you use)")
    with underway.only(paths, "reset"):
        if not resetting.is_needed(paths):
            print("nothing to reset")
            return 0
        confirm(resetting.question(paths, config), yes=yes)
        resetting.reset(paths, config, say)
    start = "systemctl start k3sagentd" if service.has_systemd(paths, config) else "k3sagentd run"
    print(f"this machine is as new; to begin anew: {start}")
    return 0


def leave(paths: Paths, *, yes: bool) -> int:
    """``k3sagentd leave``."""
    config = load_config(paths)
    with underway.only(paths, leaving.COMMAND):
        if not leaving.has_left(paths):
            confirm(leaving.QUESTION, yes=yes)
            leaving.leave(paths, config, say)
    print("this machine has left; to make a new machine of it: k3sagentd reset")
    return 0


def repair_addresses(paths: Paths, *, yes: bool) -> int:
    """``k3sagentd repair-addresses``."""
    config = load_config(paths)
    with underway.only(paths, repairing.COMMAND):
        at = attachment(config.interface, config.virtual_ip)
        daemon = _Daemon(paths)
        repair = repairing.plan(paths, config, at, daemon.status())
        if repair is None:
            repairing.look_anew(paths, daemon)
            print("nothing to repair: this machine is no server, or has the address that it had")
            return 0
        confirm(repair.question, yes=yes)
        repairing.carry_out(paths, config, repair.progress, daemon, say)
    if repair.after is not None:
        print(repair.after)
    print("K3s starts; see how far it is: k3sagentd status")
    return 0
