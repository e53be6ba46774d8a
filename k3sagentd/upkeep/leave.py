# SPDX-License-Identifier: Apache-2.0
"""``k3sagentd leave``: a machine goes out of its cluster while the cluster goes on.

A ready server drains it and deletes its Node; this machine stops K3s in between, or its kubelet
would make the Node again. Refused by that server where the quorum would go, and by what K3s's API
says here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from k3sagentd.config import Config
from k3sagentd.control import ControlClient
from k3sagentd.errors import K3sagentdError
from k3sagentd.k3s import keepalived, spared, underway
from k3sagentd.k3s.install import method
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import service

COMMAND = "leave"
LOOK_S = 5.0
"""Until the operator is told what is waited for, and again when that is something else."""
DRAINED, STOPPED, REMOVED = "drained", "stopped", "removed"
QUESTION = """\
This machine leaves its cluster: what runs on it moves elsewhere, K3s stops here, and its Node is
deleted, on a server with its member of etcd. It does not come back by itself: k3sagentd reset makes
a new machine of it. K3s's data stays on the disk until then."""

Say = Callable[[str], None]


def has_left(paths: Paths) -> bool:
    """Whether there is nothing more to do."""
    return paths.left.exists() and not paths.underway.exists() and service.pid(paths) is None


def leave(paths: Paths, config: Config, say: Say) -> None:
    """Do what is left to do; raises K3sagentdError."""
    underway.check(paths, COMMAND)
    progress = underway.load(paths)
    if progress is None and paths.left.exists():
        progress = Progress(command=COMMAND, step=REMOVED)
    if progress is None:
        say("a server drains this machine; that may take some minutes")
        _ask(paths, "drain", say)
        # That took its time, and others may have gone or left meanwhile.
        _ask(paths, "stop", say)
        _check_is_spared(paths, config)
        progress = underway.save(paths, Progress(command=COMMAND, step=DRAINED))
    elif progress.step == DRAINED and method(config, paths).running():
        # The word that it may stop is of before it was cut short. Who has stopped since needs none,
        # and would get none: off, it is a member still, and counts until its Node is deleted.
        _ask(paths, "stop", say)
    if progress.step == DRAINED:
        say("stop K3s, now and at every boot")
        with underway.alone(paths):
            _check_is_spared(paths, config)  # much may have happened since it was cut short
            method(config, paths).stop()
            keepalived.withdraw(config, paths)
        progress = underway.save(paths, replace(progress, step=STOPPED))
    if progress.step == STOPPED:
        say("a server deletes this machine's Node")
        _ask(paths, "remove", say)
        underway.save(paths, replace(progress, step=REMOVED))
    say("stop the daemon, now and at every boot")
    service.mark(paths, "this machine has left its site; k3sagentd reset makes a new one of it")
    underway.clear(paths)
    service.stop(paths, config)


def _check_is_spared(paths: Paths, config: Config) -> None:
    spared.check(paths, running=method(config, paths).running())


def _ask(paths: Paths, step: str, say: Say) -> None:
    asyncio.run(_answered(ControlClient(paths.control), step, say))


async def _answered(client: ControlClient, step: str, say: Say) -> None:
    """Have one step done, and say what it waits for; raises K3sagentdError."""
    asked = asyncio.create_task(client.leave(step))
    told = None
    while not (await asyncio.wait({asked}, timeout=LOOK_S))[0]:
        with contextlib.suppress(K3sagentdError):
            now = (await client.status())["status"]["node"]["leaving"]
            if now and now != told:
                say(f"waits for {now}")
                told = now
    asked.result()
