# SPDX-License-Identifier: Apache-2.0
"""What the core knows and wants of this machine's K3s: facts, order, result.

Plain data. Who reads the disk, writes the files and runs the commands is in ``k3sagentd/k3s``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from k3sagentd.core.words import NodeId


class Datastore(StrEnum):
    """What K3s's data directory holds (K3S.md 1); it decides what K3s does at its next start."""

    NONE = "none"
    SQLITE = "sqlite"
    ETCD = "etcd"
    AGENT = "agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What root found on this machine; secrets never stand here."""

    datastore: Datastore = Datastore.NONE
    origin: int | None = None
    """Epoch in which an init order made this data; None: it was there before us."""
    origin_generation: int = 0
    """The generation of the bootstrap log that ``origin`` is an epoch of."""
    origin_node: NodeId | None = None
    """The node that this order was given to. Each log begins at epoch 0, so another one's, or None,
    is of an earlier life: for this node such data was there before."""
    ca_hash: str | None = None
    """SHA-256 (64 hex) of ``server/tls/server-ca.crt``, where there is one."""
    fsync_ms: float | None = None
    """Median latency of an 8 KiB write and fdatasync in the data directory's file system."""
    shared_flags: Mapping[str, str] = field(default_factory=dict)
    """This machine's own settings of the flags that all servers must share (K3S.md 4);
    values are canonical strings (JSON for what is no string)."""
    node_name: str | None = None
    """K3s's name for this machine where K3s was there before us: it cannot be chosen any more. None
    on a machine whose K3s is ours or has no data."""
    told_name: str | None = None
    """The name that an order of ours gave K3s, where K3s has data under it: a Node, and perhaps a
    member of etcd, that a node which lost its state or is new on this disk goes on with."""
    node_ip: str | None = None
    """With etcd data: the address that K3s is configured with, by which etcd knows this member.
    None where K3s takes what it finds at each start, and while a command changes it."""
    removed: bool = False
    """Its etcd data is of a member that etcd has removed, of a K3s that was there before us."""
    unfinished: str | None = None
    """The operator's command that was begun on this machine and has not ended, if any."""


class Action(StrEnum):
    """What an order asks of ``k3sagentd apply``."""

    INIT = "init"
    PREPARE = "prepare"
    JOIN = "join"
    STEP_DOWN = "step-down"
    """A server becomes an agent: its server's data goes aside, then it joins."""
    STAND_DOWN = "stand-down"


class ServerOrAgent(StrEnum):
    """K3s's two roles."""

    SERVER = "server"
    AGENT = "agent"


RELEASE = re.compile(
    r"v(\d{1,4})\.(\d{1,4})\.(\d{1,4})(-[0-9A-Za-z.]{1,32})?\+k3s(\d{1,4})", re.ASCII
)
"""A K3s release: Kubernetes' version, and how often it was built for it."""


def release_key(release: str) -> tuple[tuple[int, ...], bool, str, int]:
    """What orders releases, the older first; a pre-release is older than its version
    (semver.org, 11). Raises ValueError for what is no release."""
    found = RELEASE.fullmatch(release)
    if found is None:
        raise ValueError(f"{release!r:.80} is no K3s release")
    *version, pre, build = found.groups()
    return tuple(map(int, version)), pre is None, pre or "", int(build)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What this node's K3s should be. Written by the unprivileged daemon, obeyed by root after
    strict checks; never holds a secret, a path or a command."""

    action: Action
    epoch: int
    role: ServerOrAgent
    node_name: str
    servers: tuple[str, ...] = ()
    """Registration addresses (``https://host:6443``), best first; for JOIN."""
    ca_hash: str | None = None
    """64 hex; for JOIN. What ``/cacerts`` of each server must have."""
    k3s_version: str | None = None
    """Release to install so that no node is newer than its servers; None: what the configuration
    says."""
    shared_flags: Mapping[str, str] = field(default_factory=dict)
    """Flags handed out with the registration; for JOIN of a server."""
    attempt: int = 0
    """Counts retries, so that a retry is a different order."""
    instance: str = ""
    """The run of the daemon that gave it: an answer to an earlier run's order is not its own."""
    node: str = ""
    """The machine's node id, for the label of its Node object (``cluster.NODE_LABEL``), and for
    the mark in the data of a cluster that it starts."""
    hardware: str | None = None
    """The mark of its hardware, for the label ``cluster.HARDWARE_LABEL``."""
    generation: int = 0
    """Generation of the bootstrap log: the operator's forced starts so far."""

    def describe(self) -> str:
        """As people read it."""
        return f"{self.action} as {self.role} in epoch {self.epoch}, attempt {self.attempt + 1}"


class Outcome(StrEnum):
    """How an order ended, or how far it is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """May succeed when tried again."""
    FAILED_FOR_GOOD = "failed-for-good"
    """Will not succeed without a person (or at all) on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What ``apply`` says of an order, step by step."""

    order: Order
    outcome: Outcome
    step: str
    """The step that runs, or the one that failed, as people read it."""
    reason: str | None = None
    """For a failure: what failed, found, expected, to do."""
    started: bool = False
    """For a failure: whether K3s runs all the same, and what was ordered may come true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class K3sState:
    """What a probe of the running K3s shows."""

    running: bool = False
    ready: bool = False
    ca_hash: str | None = None
    """SHA-256 of ``/cacerts`` (only a server that is ready has one)."""
    detail: str = "K3s is not running"
    """One phrase: what the probe found."""
