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
from typing import Any

from k3sagentd import site_token
from k3sagentd.config import Config
from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.core.words import NodeId
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError, MachineError, TimedOutError, UnavailableError
from k3sagentd.files import fsync_directory, write_atomically
from k3sagentd.k3s import dropin, underway
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.facts import write_facts
from k3sagentd.k3s.install import method, run
from k3sagentd.k3s.kube import ConflictError, Kube
from k3sagentd.k3s.quorum import quorum, removal_trouble
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import load, merge

COMMAND = "repair-addresses"
OURS = "# Written by k3sagentd"
ASIDE = "etcd.before-repair"
RESET_TIMEOUT_S = 900.0
API_TIMEOUT_S = 600.0
API_POLL_S = 1.0
STALE_S = 60.0
"""A Node that is not heard is not ready after 40 s (kube-controller-manager), and some."""
BY_HAND = (
    "K3s was set up by hand here. By hand: stop K3s; on a server that is ready: kubectl delete "
    "node THIS; here: move server/db/etcd aside, set node-ip, and server to that one; start K3s. "
    "Where no server is ready, first on one of them: k3s server --cluster-reset"
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What must be done, and what people must read before."""

    progress: Progress
    question: str


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
    first = before or Progress(command=COMMAND, step="", name=str(told["node-name"]))
    here = replace(first, address=at.address, node=NodeId(status["node"]["id"]))
    was = str(told["node-ip"])
    if first.step in (RESET, START) and first.server is None:
        return _reset(here, was)  # this server's copy is the cluster: there is nobody else to ask
    if servers := _ready_servers(status):
        return _rejoin(paths, here, servers, was)
    if first.server is not None:
        raise UnavailableError(f"{first.server}, which this repair began with, is not ready now")
    _check_unheard(status)
    return _reset(here, was)


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


def _ready_servers(status: Mapping[str, Any]) -> list[str]:
    return [
        f"https://{_bracketed(row['address'])}:6443"
        for row in _others(status)
        if row["phase"] == "ready" and row["age_s"] == 0 and row["address"]
    ]


def _others(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    own = status["node"]["id"]
    rows = status["nodes"]
    return [row for row in rows if row["role"] == "server" and row["id"] != own]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _rejoin(paths: Paths, here: Progress, servers: list[str], was: str) -> Repair:
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
                f"This server was {was} and is {here.address} now; etcd knows it by the old one.\n"
                f"K3s stops here, {url} forgets this member, and K3s joins\n"
                f"there as a new one; its data of etcd is moved aside ({ASIDE}). The\n"
                "cluster goes on meanwhile."
            ),
        )
    raise UnavailableError("; ".join(reasons))


def _check_unheard(status: Mapping[str, Any]) -> None:
    """Raise UnavailableError while the servers that are not heard could be a quorum elsewhere."""
    others = _others(status)
    heard = [row for row in others if row["age_s"] == 0 and row["phase"] != "ready"]
    silent = [row for row in others if row["age_s"] > 0]
    roster = status["site"].get("roster")
    known = {status["node"]["id"], *(row["id"] for row in others)}
    if roster is None:
        total = max(len(known), int(status["site"]["servers"]))
    else:
        total = len(known | set(roster))
    unheard = total - 1 - len(heard)
    if unheard < quorum(total):
        return
    names = [f"{row['name']} ({row['address'] or 'no address'})" for row in silent]
    if unheard > len(silent):
        names.append(f"{unheard - len(silent)} of which nothing is known")
    raise UnavailableError(
        f"no server is ready, and {unheard} of {total} are not heard: they may be a quorum of the "
        f"cluster somewhere else. Not heard: {', '.join(names)}. Power them on, or mend the network"
    )


def _reset(here: Progress, was: str) -> Repair:
    return Repair(
        progress=here,
        question=(
            f"This server was {was} and is {here.address} now, and no server of the cluster is\n"
            "ready. The copy of the cluster on THIS machine becomes the cluster; what only others\n"
            "had committed is lost. Choose the server that was up last, and do this on that one\n"
            "only. The other servers join it afterwards, by the same command, one after the other."
        ),
    )


# --- doing it -------------------------------------------------------------------------------

STOP = "stop K3s"
REMOVE = "have the other server forget this member"
MOVE = "move etcd's data aside"
WRITE = "write the new address"
RESET = "make this server's copy the cluster (k3s server --cluster-reset)"
START = "start K3s"
JOIN = "wait until it has joined"
FORGET = "wait for it, and forget the other servers' Nodes, which are no members now"


def carry_out(paths: Paths, config: Config, progress: Progress, say: Say) -> None:
    """Do what is left to do, keeping each step; raises K3sagentdError."""
    doing: dict[str, Callable[[Progress], None]] = {
        STOP: lambda _: method(config, paths).stop(),
        REMOVE: lambda p: _remove(paths, p),
        MOVE: lambda _: _move_aside(paths),
        WRITE: lambda p: _write(paths, config, p),
        RESET: lambda _: _cluster_reset(paths, config),
        START: lambda _: method(config, paths).start(ServerOrAgent.SERVER),
        JOIN: lambda _: _await_member(paths),
        FORGET: lambda p: _forget_others(paths, p, late=late),
    }
    steps = [STOP, WRITE, RESET, START, FORGET]
    if progress.server is not None:
        steps = [STOP, REMOVE, MOVE, WRITE, START, JOIN]
    done = steps.index(progress.step) + 1 if progress.step in steps else 0
    late = progress.step == START
    underway.save(paths, progress)
    for step in steps[done:]:
        say(step)
        with underway.alone(paths):
            doing[step](progress)
        underway.save(paths, replace(progress, step=step))
    with contextlib.suppress(ConfigError, OSError):
        write_facts(paths)
    underway.clear(paths)


def _remove(paths: Paths, progress: Progress) -> None:
    """Delete our own Node there, and with it our member; gone is fine."""
    assert progress.server is not None, "only asked where there is one"
    kube = Kube(paths, progress.server)
    nodes = kube.nodes()
    own = next((each for each in nodes if each.node.name == progress.name), None)
    if own is None:
        return
    # With another uid it is ours where it says so: K3s made it anew, in a run that was killed.
    if own.node.uid != progress.uid and (own.node.node is None or own.node.node != progress.node):
        raise MachineError(
            f"the Node {own.node.name} at {progress.server} is not the one that this machine had: "
            "another machine has taken its name"
        )
    if trouble := removal_trouble([each.node for each in nodes], own.node.name):
        raise UnavailableError(trouble)
    kube.delete_node(own)


def _move_aside(paths: Paths) -> None:
    etcd = paths.k3s_data / "server/db/etcd"
    if not etcd.exists():
        return
    number, aside = 2, etcd.with_name(ASIDE)
    while aside.exists():
        aside, number = etcd.with_name(f"{ASIDE}-{number}"), number + 1
    etcd.rename(aside)
    fsync_directory(etcd.parent)


def _write(paths: Paths, config: Config, progress: Progress) -> None:
    """Our drop-in with the new address, and where to join; no join trusts on first use."""
    values = load(paths.dropin)
    was, now = values["node-ip"], progress.address
    names = values.get("tls-san")
    names = names if isinstance(names, list) else [names] if names else []
    values["tls-san"] = list(dict.fromkeys([now, *(each for each in names if each != was)]))
    values["node-ip"] = now
    for key in ("cluster-init", "server"):
        values.pop(key, None)
    if progress.server is not None:
        values["server"] = progress.server
        if not paths.k3s_token.read_text().startswith("K10"):
            ca = hash_of_cacerts((paths.k3s_data / "server/tls/server-ca.crt").read_bytes())
            token = site_token.load(config.token_file).decode()
            write_atomically(paths.k3s_token, f"K10{ca}::server:{token}\n".encode(), mode=0o600)
    write_atomically(paths.dropin, dropin.render(values), mode=0o600)


def _cluster_reset(paths: Paths, config: Config) -> None:
    """K3s's documented way; its flag of an attempt that was cut off goes first, as it asks for.

    K3s, pkg/etcd/etcd.go Reset: sets the flag, starts etcd as a cluster of its own, ends with 0.
    """
    (paths.k3s_data / "server/db/reset-flag").unlink(missing_ok=True)
    run(
        [str(config.install.binary), "server", "--cluster-reset"],
        timeout_s=RESET_TIMEOUT_S,
        what="k3s server --cluster-reset",
    )


def _await_member(paths: Paths) -> None:
    """Until K3s has data of etcd again: before that it looks like no server at all."""
    deadline = time.monotonic() + API_TIMEOUT_S
    while datastore(paths.k3s_data) is not Datastore.ETCD:
        if time.monotonic() > deadline:
            raise TimedOutError("K3s has not joined yet (journalctl -u k3s); run it again")
        time.sleep(API_POLL_S)


def _forget_others(paths: Paths, progress: Progress, *, late: bool) -> None:
    """Delete the Nodes of the servers that are no members any more; each joins as a new one.

    Those are all that were there when K3s came up. Where we look ``late``, after a kill, some may
    have joined since: then those that are not ready once that can be told.
    """
    if late:
        time.sleep(STALE_S)
    stale: set[str] | None = None
    deadline = time.monotonic() + API_TIMEOUT_S
    while True:
        try:
            kube = Kube(paths)
            others = [
                each
                for each in kube.nodes()
                if each.node.server and each.node.name != progress.name
            ]
            if stale is None:
                stale = {each.node.uid for each in others if not (late and each.node.ready)}
            for each in others:
                if each.node.uid in stale:
                    kube.delete_node(each)
            return
        except ConflictError:
            pass  # its state was written meanwhile
        except MachineError as error:
            if time.monotonic() > deadline:
                raise TimedOutError(f"K3s is not ready here: {error}; run it again") from error
        time.sleep(API_POLL_S)
