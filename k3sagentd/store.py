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


def save(directory: Path, durable: Durable) -> None:
    """Make ``durable`` survive a power cut; raises OSError, then the old state still stands."""
    state = schema.dumps(durable)
    document = {
        "version": FORMAT_VERSION,
        "sha256": hashlib.sha256(state.encode()).hexdigest(),
        "state": json.loads(state),
    }
    text = json.dumps(document, sort_keys=True, indent=1) + "\n"
    write_atomically(directory / FILE_NAME, text.encode(), mode=0o600)


def load(directory: Path, node: NodeId, *, fresh: bool) -> Durable:
    """Return the state of identity ``node``.

    With ``fresh`` the identity was made just now, so that nothing it said can be lost. Otherwise
    a missing or damaged file gives (and saves) a state that never votes. Raises OSError.
    """
    path = directory / FILE_NAME
    if fresh:
        durable = Durable(node=node)
        save(directory, durable)
        return durable
    try:
        return _parse(read_bounded(path, SIZE_LIMIT_BYTES), node)
    except FileNotFoundError:
        reason = f"its votes are lost ({path} is missing)"
    except DataError as error:
        kept = _keep_aside(path)
        reason = f"its votes are lost ({path} is damaged: {error}; kept as {kept.name})"
    reason += "; it never votes again under this identity: k3sagentd reset gives it a new one"
    log.error("%s", reason)
    durable = Durable(node=node, muted=reason)
    save(directory, durable)
    return durable


def _parse(data: bytes, node: NodeId) -> Durable:
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


def _keep_aside(path: Path) -> Path:
    """Copy the damaged bytes to a name that is free."""
    data = path.read_bytes()
    for number in range(1, 1000):
        kept = path.with_name(f"{path.name}.damaged-{number}")
        if not kept.exists():
            write_atomically(kept, data, mode=0o600)
            return kept
    return path.with_name(f"{path.name}.damaged-999")
