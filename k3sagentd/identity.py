# SPDX-License-Identifier: Apache-2.0
"""Who this node is: its key, made at the first start, bound to the hardware (design, 4.1).

An identity that finds itself on other hardware was copied with its card. It is put aside with
its votes, and a new one is made: two machines must never vote under one name.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from k3sagentd import schema, store
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NODE_ID_LENGTH, NodeId
from k3sagentd.errors import DataError
from k3sagentd.files import fsync_directory, read_bounded, write_atomically
from k3sagentd.hardware import Hardware, same_machine
from k3sagentd.keys import SiteKeys, leaf_certificate

log = logging.getLogger(__name__)

KEY_FILE = "node.key"
BINDING_FILE = "node.json"
FILE_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What stands beside the key: the id it must have and the hardware it was made on."""

    node: NodeId
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class Identity:
    """This node's identity on its site."""

    node: NodeId
    key: Ed25519PrivateKey
    certificate: x509.Certificate
    moved: str | None = None
    """Why an earlier identity was put aside, and where, if so."""

    @property
    def key_pem(self) -> bytes:
        """The private key in PKCS #8."""
        return _key_pem(self.key)

    @property
    def certificate_pem(self) -> bytes:
        """The leaf certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


def node_id_of(key: Ed25519PublicKey) -> NodeId:
    """The node id of a public key."""
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return NodeId(hashlib.sha256(raw).hexdigest()[:NODE_ID_LENGTH])


def load_or_create(state: Path, keys: SiteKeys, hardware: Hardware) -> Identity:
    """Return the identity that lives in the directory ``state``, making one where none fits.

    Raises OSError. A damaged key or binding counts as no identity: it is put aside as well.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    moved = None
    if (state / KEY_FILE).exists() or (state / BINDING_FILE).exists():
        try:
            key, binding = _load(state)
        except DataError as error:
            moved = put_aside(state, f"the identity is damaged ({error})")
        else:
            if same_machine(binding.hardware, hardware):
                _learn_hardware(state, binding, hardware)
                return _identity(keys, key)
            moved = put_aside(state, "the card was moved here from another machine")
    key = Ed25519PrivateKey.generate()
    # The key last: an identity that a power cut left without one has said nothing and is made
    # anew, and one that has a key has a file for its votes, whose loss is noticed (store.restore).
    node = node_id_of(key.public_key())
    _write_binding(state, Binding(node=node, hardware=hardware))
    store.save(state, Durable(node=node))
    write_atomically(state / KEY_FILE, _key_pem(key), mode=0o600)
    return _identity(keys, key, moved=moved)


def load(state: Path, hardware: Hardware) -> Ed25519PrivateKey:
    """The key of an identity that was made before, on this very machine; raises DataError."""
    key, binding = _load(state)
    if not same_machine(binding.hardware, hardware):
        raise DataError("the card was moved here from another machine")
    return key


def node_id_in(state: Path) -> NodeId:
    """The id of the identity that lives in ``state``; raises DataError."""
    return _load(state)[1].node


def _identity(keys: SiteKeys, key: Ed25519PrivateKey, *, moved: str | None = None) -> Identity:
    node = node_id_of(key.public_key())
    return Identity(node, key, leaf_certificate(keys, key, node), moved)


def _load(state: Path) -> tuple[Ed25519PrivateKey, Binding]:
    try:
        key = load_pem_private_key(read_bounded(state / KEY_FILE, FILE_LIMIT_BYTES), None)
        binding = schema.loads(Binding, read_bounded(state / BINDING_FILE, FILE_LIMIT_BYTES))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{KEY_FILE}: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{KEY_FILE} is not an Ed25519 key")
    if node_id_of(key.public_key()) != binding.node:
        raise DataError(f"{KEY_FILE} and {BINDING_FILE} are of two nodes")
    return key, binding


def _learn_hardware(state: Path, binding: Binding, hardware: Hardware) -> None:
    """Keep up with interfaces that came late, so that their going later is no surprise."""
    merged = Hardware(
        serial=hardware.serial or binding.hardware.serial,
        uuid=hardware.uuid or binding.hardware.uuid,
        macs=hardware.macs or binding.hardware.macs,
    )
    if merged != binding.hardware:
        _write_binding(state, Binding(node=binding.node, hardware=merged))


def _write_binding(state: Path, binding: Binding) -> None:
    text = schema.dumps(binding, indent=1) + "\n"
    write_atomically(state / BINDING_FILE, text.encode(), mode=0o600)


def put_aside(state: Path, why: str) -> str:
    """Move the identity and its votes into a directory of their own; returns what was done."""
    number = next(n for n in range(1, 10**6) if not (state / f"moved-{n}").exists())
    aside = state / f"moved-{number}"
    aside.mkdir(mode=0o700)
    # The key last: while it is here, a restart after a power cut comes here again.
    files = sorted(state.iterdir(), key=lambda path: path.name == KEY_FILE)
    for path in files:
        if not path.name.startswith("moved-"):
            path.rename(aside / path.name)
    fsync_directory(aside)
    fsync_directory(state)
    text = f"{why}; its files are in {aside}, this node has a new identity"
    log.warning("%s", text)
    return text


def _key_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
