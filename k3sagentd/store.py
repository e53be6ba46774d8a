# SPDX-License-Identifier: Apache-2.0
"""The durable state on disk: one file with a checksum, written whole, read with distrust.

An acceptor that forgot its votes may vote twice. So a file that is damaged, or gone while the
identity is still there, mutes this identity for ever; the damaged bytes are kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from k3sagentd import schema
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId
from k3sagentd.errors import DataError
from k3sagentd.files import read_bounded, write_atomically

log = logging.getLogger(__name__)

FILE_NAME = "log.json"
FORMAT_VERSION = 1
SIZE_LIMIT_BYTES = 8 * 1024 * 1024


def encode(durable: Durable) -> bytes:
    """The file's bytes: the same for equal states."""
    state = schema.dumps(durable)
    document = {
        "version": FORMAT_VERSION,
        "sha256": hashlib.sha256(state.encode()).hexdigest(),
        "state": json.loads(state),
    }
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def save(directory: Path, durable: Durable) -> None:
    """Make ``durable`` survive a power cut; raises OSError, then the old state still stands."""
    write_atomically(directory / FILE_NAME, encode(durable), mode=0o600)


def load(directory: Path, node: NodeId) -> Durable:
    """Return the state of identity ``node``; a missing or damaged file is kept aside.

    What was lost gives (and saves) a state that never votes. Raises OSError.
    """
    path = directory / FILE_NAME
    try:
        data = read_bounded(path, SIZE_LIMIT_BYTES)
    except FileNotFoundError:
        data = None
    durable, whole = restore(data, node)
    if not whole:
        kept = f"; kept as {_keep_aside(path, data).name}" if data is not None else ""
        log.error("%s: %s%s", path, durable.muted, kept)
        save(directory, durable)
    return durable


def restore(data: bytes | None, node: NodeId) -> tuple[Durable, bool]:
    """The state that the file's bytes stand for, and whether it is all that was ever said.

    None: there is no file. ``identity`` writes one before the key of an identity, so its absence
    is a loss like any damage.
    """
    try:
        if data is None:
            raise DataError("the file is missing")
        return _decode(data, node), True
    except DataError as error:
        reason = f"its votes are lost ({FILE_NAME}: {error}), and this identity never votes again"
        return Durable(node=node, muted=reason), False


def _decode(data: bytes, node: NodeId) -> Durable:
    try:
        document = json.loads(data)
        version, digest, state = document["version"], document["sha256"], document["state"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"not a state file: {type(error).__name__}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"format version is {version!r}, not {FORMAT_VERSION}")
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise DataError("the checksum does not match")
    durable: Durable = schema.from_plain(Durable, state)
    if durable.node != node:
        raise DataError(f"it belongs to node {durable.node[:8]}, not to {node[:8]}")
    return durable


def _keep_aside(path: Path, data: bytes) -> Path:
    """Copy the damaged bytes to a name that is free."""
    for number in range(1, 1000):
        kept = path.with_name(f"{path.name}.damaged-{number}")
        if not kept.exists():
            write_atomically(kept, data, mode=0o600)
            return kept
    return path.with_name(f"{path.name}.damaged-999")
