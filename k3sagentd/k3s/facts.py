# SPDX-License-Identifier: Apache-2.0
"""What root finds on this machine: K3s's data, the disk's speed, the hardware's marks.

Written to ``facts.json`` for the daemon, which may not look itself. Never holds a secret.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from k3sagentd import schema
from k3sagentd.config import Config, load_config
from k3sagentd.core.k3s import Datastore, Facts, ServerOrAgent
from k3sagentd.core.words import NodeId
from k3sagentd.errors import ConfigError, DataError, MachineError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.hardware import Hardware, read_hardware
from k3sagentd.k3s import dropin, flags, underway
from k3sagentd.k3s.data import ca_hash, datastore, is_removed, read_marker
from k3sagentd.k3s.ownership import is_adopted
from k3sagentd.k3s.settings import configured, node_ip, node_name, told
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

FACTS_LIMIT_BYTES = 256 * 1024
FSYNC_SAMPLES = 7
FSYNC_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """The file: facts for the core, marks for the identity."""

    facts: Facts
    hardware: Hardware


def write_facts(paths: Paths) -> MachineFacts:
    """Look, and write down what was seen; raises ConfigError or OSError."""
    config = load_config(paths)
    previous = None
    with contextlib.suppress(DataError, OSError):
        previous = read_facts(paths)
    found = MachineFacts(
        facts=collect(paths, config, previous.facts.fsync_ms if previous else None),
        hardware=read_hardware(paths.root),
    )
    paths.run.mkdir(parents=True, exist_ok=True)
    if found != previous:
        write_atomically(paths.facts, schema.dumps(found, indent=1).encode(), durable=False)
    return found


def read_facts(paths: Paths) -> MachineFacts | None:
    """What root wrote; None while there is nothing. Raises DataError, OSError."""
    try:
        return schema.loads(MachineFacts, read_bounded(paths.facts, FACTS_LIMIT_BYTES))
    except FileNotFoundError:
        return None


def collect(paths: Paths, config: Config, fsync_ms: float | None = None) -> Facts:
    """The facts about K3s on this machine; the disk is measured once per boot."""
    store = datastore(paths.k3s_data)
    marker = read_marker(paths.k3s_data)
    role = ServerOrAgent.AGENT if store is Datastore.AGENT else ServerOrAgent.SERVER
    try:
        all_told = told(paths, role)
        theirs = told(paths, role, ours=False)
    except ConfigError as error:
        log.warning("%s", error)
        all_told = theirs = {}
    begun, adopted = _begun(paths), is_adopted(paths, config)
    address = node_ip(all_told)
    if begun is not None:
        # What etcd knows and what is configured may be two things: the command knows more.
        address = begun.was if begun.sure else None
    return Facts(
        datastore=store,
        origin=marker.epoch if marker else None,
        origin_generation=marker.generation if marker else 0,
        origin_node=NodeId(marker.node) if marker and marker.node else None,
        ca_hash=ca_hash(paths.k3s_data),
        fsync_ms=fsync_ms if fsync_ms is not None else measure_fsync(paths.k3s_data),
        shared_flags=flags.shared({**theirs, **configured(config, theirs)}),
        node_name=node_name(paths, all_told) if adopted else None,
        told_name=_told_name(paths, store),
        node_ip=address if store is Datastore.ETCD else None,
        removed=adopted and is_removed(paths.k3s_data),
        unfinished=begun.command if begun is not None else None,
    )


def _told_name(paths: Paths, store: Datastore) -> str | None:
    """The name in our drop-in; without data K3s was never, or is no more, known by it."""
    if store is Datastore.NONE:
        return None
    with contextlib.suppress(ConfigError):
        name = dropin.present(paths).get("node-name")
        return name if isinstance(name, str) else None
    return None


def _begun(paths: Paths) -> Progress | None:
    """The operator's command that has not ended; of one that cannot be read nothing is sure."""
    try:
        return underway.load(paths)
    except MachineError as error:
        log.warning("%s", error)
        return Progress(command="command", step="", sure=False)


def measure_fsync(data: Path) -> float | None:
    """Median latency in ms of a small synced write where etcd's log will be."""
    directory = next(path for path in (data, *data.parents) if path.is_dir())
    samples = []
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            block = os.urandom(FSYNC_BYTES)
            for _ in range(FSYNC_SAMPLES):
                file.write(block)
                file.flush()
                start_s = time.perf_counter()
                os.fdatasync(file.fileno())
                samples.append((time.perf_counter() - start_s) * 1000)
    except OSError as error:
        log.warning("cannot measure the disk below %s: %s", directory, error.strerror)
        return None
    return round(sorted(samples)[FSYNC_SAMPLES // 2], 2)
