# SPDX-License-Identifier: Apache-2.0
"""``k3sagentd repair-addresses``: a server whose own address changed gets back into etcd.

etcd knows its members by their addresses, and K3s does not change them (K3S.md 8). Its documented
ways are two. While a ready server answers, this member is removed there and joins again as a new
one. While none does, one server's copy becomes the cluster (``--cluster-reset``), and the others
join that. Nothing that K3s wrote is deleted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from k3sagentd.config import Config
from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.core.words import NodeId
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError, K3sagentdError, MachineError, UnavailableError
from k3sagentd.k3s import underway
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.facts import write_facts
from k3sagentd.k3s.install import method
from k3sagentd.k3s.kube import Kube
from k3sagentd.k3s.quorum import removal_trouble
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.upkeep import others
from k3sagentd.upkeep import repair_steps as steps
from k3sagentd.yaml_files import load, merge

COMMAND = "repair-addresses"
OURS = "# Written by k3sagentd"
BY_HAND = (
    "K3s was set up by hand here. By hand: stop K3s; on a server that is ready: kubectl delete "
    "node THIS; here: move server/db/etcd aside, set node-ip, and server to that one; start K3s. "
    "Where no server is ready, first on one of them: k3s server --cluster-reset"
)

HEARSAY_S = 12.0
"""What another machine said is held to be so until its silence is noticed (``peer/sockets.py``)."""

Say = Callable[[str], None]


class Daemon(Protocol):
    """This machine's daemon; each raises K3sagentdError where it does not answer."""

    def status(self) -> Mapping[str, Any]:
        """What ``k3sagentd status --json`` prints."""

    def reread(self) -> None:
        """Have it take in the facts that root wrote, and tell the others what follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What must be done, and what people must read before."""

    progress: Progress
    question: str
    after: str | None = None
    """What people must do when it is done."""


# --- what must be done ----------------------------------------------------------------------


def plan(
    paths: Paths, config: Config, at: Attachment | None, status: Mapping[str, Any]
) -> Repair | None:
    """What the change of address asks for; None where nothing changed.

    Raises ConfigError where it is not ours to mend, UnavailableError where it is not safe now.
    """
    underway.check(paths, COMMAND)
    before = underway.load(paths)
    if before is None and datastore(paths.k3s_data) is not Datastore.ETCD:
        return None
    told = _told(paths, config)
    if at is None:
        raise MachineError("this machine has no address now; connect it to its network first")
    if before is None and told["node-ip"] == at.address:
        return None
    if status["site"]["phase"] != "sealed":
        raise UnavailableError(f"the site is {status['site']['phase']}, not sealed")
    was, name = str(told["node-ip"]), str(told["node-name"])
    first = before or Progress(command=COMMAND, step="", name=name, was=was)
    if first.address not in (None, at.address):
        first = replace(first, step="")  # what was done was for an address that is none any more
    here = replace(first, address=at.address, node=NodeId(status["node"]["id"]))
    if first.sure and first.was == at.address:
        return _undo(here)
    if first.step == START and first.server is None:
        if method(config, paths).running():
            return _alone(here, status)  # this copy may be the cluster by now
        first = here = replace(here, step=RESET)  # it was to be started, and was not
    if servers := others.ready(status):
        return _rejoin(paths, here, servers)
    if first.server is not None:
        raise UnavailableError(f"{first.server}, which this repair began with, is not ready now")
    others.check_gone(status)
    return _alone(here, status)


def _told(paths: Paths, config: Config) -> dict[str, Any]:
    """Our drop-in; raises ConfigError where the address in it is not ours to change."""
    text = paths.dropin.read_text() if paths.dropin.exists() else ""
    values = load(paths.dropin) if text.startswith(OURS) else {}
    if not {"node-ip", "node-name"} <= values.keys():
        raise ConfigError(f"{paths.dropin} is not k3sagentd's, or says no node-ip. {BY_HAND}")
    file = merge(paths.k3s_config).file_of("node-ip")
    if "node-ip" in config.k3s:
        file = paths.config
    if file != paths.dropin:
        raise ConfigError(f"{file}: node-ip is set there: change it there first. {BY_HAND}")
    return values


def _rejoin(paths: Paths, here: Progress, servers: list[str]) -> Repair:
    """Ask the first server that answers; raises UnavailableError where the quorum would go."""
    reasons = []
    for url in servers:
        try:
            nodes = [each.node for each in Kube(paths, url).nodes()]
        except MachineError as error:
            reasons.append(str(error))
            continue
        own = next((node for node in nodes if node.name == here.name), None)
        begun = here.server is not None
        trouble = removal_trouble(nodes, str(here.name))
        if trouble and not (begun and here.step in (REMOVE, MOVE, WRITE, START)):
            raise UnavailableError(f"{trouble}; one server at a time: wait until those are ready")
        uid = here.uid or (own.uid if own else None)
        return Repair(
            progress=replace(here, server=url, uid=uid, step=here.step if begun else ""),
            question=(
                f"This server {_moved(here)}; etcd knows it by the old one.\n"
                f"K3s stops here, {url} forgets this member, and K3s joins\n"
                f"there as a new one; its data of etcd is moved aside ({steps.ASIDE}). The\n"
                "cluster goes on meanwhile."
            ),
        )
    raise UnavailableError("; ".join(reasons))


def _alone(here: Progress, status: Mapping[str, Any]) -> Repair:
    missing = others.silent(status)
    warning = (
        f"\nNot heard: {', '.join(missing)}.\n"
        "If one of them was repaired before, or is up unheard, there are two clusters for good."
    )
    return Repair(
        progress=here,
        question=(
            f"This server {_moved(here)}, and no server of the cluster is\n"
            "ready. The copy of the cluster on THIS machine becomes the cluster; what only others\n"
            "had committed is lost. Choose the server that was up last, and do this on that one\n"
            "only. The other servers join it afterwards, by the same command, one after the other."
            + (warning if missing else "")
        ),
        after=(
            "this server is the cluster now; on each other server, one after the other, run:\n"
            "  k3sagentd repair-addresses"
        ),
    )


def _undo(here: Progress) -> Repair:
    return Repair(
        progress=replace(here, server=None, step=""),
        question=(
            f"This server has the address again that etcd knows it by, {here.was}. What was\n"
            "begun is undone, and K3s starts as the member that it was."
        ),
    )


def _moved(here: Progress) -> str:
    return f"was {here.was or 'at another address'} and is {here.address} now"


# --- doing it -------------------------------------------------------------------------------

STOP = "stop K3s"
REMOVE = "have the other server forget this member"
MOVE = "move etcd's data aside"
WRITE = "write the new address"
RESET = "make this server's copy the cluster (k3s server --cluster-reset)"
START = "start K3s"
JOIN = "wait until it has joined"
FORGET = "wait for it, and forget the other servers' Nodes, which are no members now"


def carry_out(paths: Paths, config: Config, progress: Progress, daemon: Daemon, say: Say) -> None:
    """Do what is left to do, keeping each step; raises K3sagentdError.

    Nothing was looked at while the operator thought: what the plan rests on is checked again before
    anything is done, and directly before RESET.
    """
    doing: dict[str, Callable[[Progress], None]] = {
        STOP: lambda _: method(config, paths).stop(),
        REMOVE: lambda p: steps.remove(paths, p),
        MOVE: lambda _: steps.move_aside(paths),
        WRITE: lambda p: steps.write(paths, config, p),
        RESET: lambda p: _reset(paths, config, p, daemon),
        START: lambda _: method(config, paths).start(ServerOrAgent.SERVER),
        JOIN: lambda _: steps.await_member(paths),
        FORGET: lambda p: steps.forget_others(paths, p, late=late),
    }
    back = progress.sure and progress.address == progress.was
    way = [STOP, REMOVE, MOVE, WRITE, START, JOIN]
    if progress.server is None:
        way = [STOP, WRITE, START] if back else [STOP, WRITE, RESET, START, FORGET]
    late = progress.step == START
    if progress.server is None and not (back or late):
        _check_alone(progress, daemon)
    underway.save(paths, progress)
    for step in _left(way, progress.step):
        say(step)
        with underway.alone(paths):
            if step in (REMOVE, RESET):
                progress = _tell(paths, replace(progress, sure=False), daemon)
            if step == START:
                progress = underway.save(paths, replace(progress, step=step))
            doing[step](progress)
        if step != way[-1]:
            progress = underway.save(paths, replace(progress, step=step))
    underway.clear(paths)
    look_anew(paths, daemon)


def _left(way: list[str], done: str) -> list[str]:
    """What is left to do after ``done``.

    START is kept before it is done: from then on K3s may run, with what this machine has. So it is
    done again, and nothing before it. RESET is done again until then, with all that is checked
    before it: what it made has never run.
    """
    if done in (RESET, START):
        return way[way.index(done) :]
    return way[way.index(done) + 1 if done in way else 0 :]


def look_anew(paths: Paths, daemon: Daemon) -> None:
    """What is on the disk now, for the daemon, so that it says what is so; as far as it can."""
    with contextlib.suppress(K3sagentdError, OSError):
        write_facts(paths)
        daemon.reread()


def _tell(paths: Paths, progress: Progress, daemon: Daemon) -> Progress:
    """Keep ``progress`` and have the daemon tell the others what follows; raises K3sagentdError."""
    underway.save(paths, progress)
    write_facts(paths)
    daemon.reread()
    return progress


def _check_alone(progress: Progress, daemon: Daemon) -> None:
    """Raise UnavailableError unless this server's copy may be made the cluster now."""
    status = daemon.status()
    if status["node"]["address"] != progress.address:
        raise UnavailableError(
            f"this machine's address is {status['node']['address']} now, it was "
            f"{progress.address} when this began; run it again"
        )
    others.check_gone(status)


def _reset(paths: Paths, config: Config, progress: Progress, daemon: Daemon) -> None:
    """Make this copy the cluster, unless another server may be it by now.

    The others were told before that this server is no bystander any more. Of two on which this is
    done at once, each hears that of the other, and neither goes on.
    """
    try:
        time.sleep(HEARSAY_S)
        _check_alone(progress, daemon)
    except (UnavailableError, KeyboardInterrupt):
        _tell(paths, replace(progress, sure=True), daemon)
        raise
    steps.cluster_reset(paths, config)
