# SPDX-License-Identifier: Apache-2.0
"""What root finds on this machine: K3s's data, the disk's speed, the hardware's marks.

Written to ``facts.json`` for the daemon, which may not look itself. Never holds a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from k3sagentd import schema
from k3sagentd.config import Config, load_config
from k3sagentd.core.k3s import Datastore, Facts
from k3sagentd.errors import ConfigError, DataError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.hardware import Hardware, read_hardware
from k3sagentd.k3s import flags
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import merge

log = logging.getLogger(__name__)

MARKER = "k3sagentd.json"
"""In K3s's data directory: which epoch's order made it."""
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
    data = paths.k3s_data
    store = datastore(data)
    return Facts(
        datastore=store,
        origin=read_marker(data),
        ca_hash=_ca_hash(data),
        fsync_ms=fsync_ms if fsync_ms is not None else measure_fsync(data),
        shared_flags=flags.shared(_options(paths, config)),
    )


def _options(paths: Paths, config: Config) -> dict[str, object]:
    """K3s's options as the operator set them: in K3s's own files or in ours."""
    try:
        own = merge(paths.k3s_config)
    except ConfigError as error:
        log.warning("%s", error)
        return dict(config.k3s)
    theirs = {key: v for key, v in own.values.items() if own.file_of(key) != paths.dropin}
    return {**theirs, **config.k3s}


def datastore(data: Path) -> Datastore:
    """What K3s would go on with at its next start (K3S.md 1)."""
    if (data / "server/db/etcd/member/wal").exists():
        return Datastore.ETCD
    if (data / "server/db/state.db").exists():
        return Datastore.SQLITE
    if (data / "agent/client-kubelet.crt").exists():
        return Datastore.AGENT
    return Datastore.NONE


def read_marker(data: Path) -> int | None:
    """The epoch in which our init order made this data."""
    try:
        epoch = json.loads(read_bounded(data / MARKER, 4096))["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return epoch if type(epoch) is int and epoch >= 0 else None


def _ca_hash(data: Path) -> str | None:
    """SHA-256 of the server CA, or of the agent's copy of it (K3S.md 2)."""
    for name in ("server/tls/server-ca.crt", "agent/server-ca.crt"):
        with contextlib.suppress(OSError):
            return hashlib.sha256(read_bounded(data / name, 256 * 1024)).hexdigest()
    return None


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
