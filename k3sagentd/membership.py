# SPDX-License-Identifier: Apache-2.0
"""What makes this node a member of its site: whom it takes in, and by what others know it.

From the tokens, or, on an agent that was told to forget its token (``forget-token``), from a file
that the daemon kept: its certificate and the site's CA, but not the CA's key. Who holds that file
and the node's key is this node and can make no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from k3sagentd import schema
from k3sagentd.core.words import NodeId
from k3sagentd.errors import ConfigError, DataError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.hardware import Hardware
from k3sagentd.identity import Identity, load, load_or_create, node_id_of
from k3sagentd.keys import SiteKeys
from k3sagentd.site_token import Tokens

KEPT_FILE = "site.json"
FILE_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Membership:
    """One node's membership."""

    site_id: str
    """The site's id as this node shows it."""
    site_ids: frozenset[str]
    """Under which others are looked for: more than one while the token is rotated."""
    authorities: tuple[x509.Certificate, ...]
    """The CAs of these."""
    identity: Identity
    election_key: bytes = b""
    """Empty without a token: such a node is sealed and elects nobody."""
    node_passwords: tuple[str, ...] = ()
    """What K3s may take for its user ``node``, the likeliest first (K3S.md 2)."""

    @property
    def tokenless(self) -> bool:
        """Whether this node forgot its token."""
        return not self.election_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The file."""

    site_id: str
    authorities: tuple[str, ...]
    """Certificates in PEM."""
    certificate: str
    """The node's own, in PEM."""


def from_tokens(
    tokens: Tokens, keys: Sequence[SiteKeys], state: Path, hardware: Hardware
) -> Membership:
    """The membership that ``tokens`` give; ``keys`` are those of ``tokens.accepted``, in order.

    Raises OSError.
    """
    shown = keys[0]
    agent_tokens = [each.agent_token for each in keys]
    return Membership(
        site_id=shown.site_id,
        site_ids=frozenset(each.site_id for each in keys),
        authorities=tuple(each.ca_certificate for each in keys),
        identity=load_or_create(state, shown, hardware),
        election_key=shown.election_key,
        node_passwords=(*agent_tokens, *(each.decode() for each in tokens.accepted)),
    )


def keep(state: Path, membership: Membership) -> None:
    """Write what is needed to go on without the token; raises OSError."""
    kept = Kept(
        site_id=membership.site_id,
        authorities=pems(membership.authorities),
        certificate=membership.identity.certificate_pem.decode("ascii"),
    )
    text = schema.dumps(kept, indent=1) + "\n"
    write_atomically(state / KEPT_FILE, text.encode(), mode=0o600)


def from_kept(state: Path, hardware: Hardware) -> Membership:
    """The membership that ``keep`` wrote; raises ConfigError where it does not suffice."""
    try:
        kept = read_kept(state)
        key = load(state, hardware)
        certificate = check(kept, node_id_of(key.public_key()))
    except (DataError, OSError) as error:
        raise ConfigError(
            f"this machine forgot its token, and what it kept does not suffice: {error}; give it "
            "the token again"
        ) from error
    identity = Identity(node_id_of(key.public_key()), key, certificate)
    return Membership(
        site_id=kept.site_id,
        site_ids=frozenset({kept.site_id}),
        authorities=tuple(_certificate(each) for each in kept.authorities),
        identity=identity,
    )


def read_kept(state: Path) -> Kept:
    """The file as it is; raises DataError, OSError."""
    return schema.loads(Kept, read_bounded(state / KEPT_FILE, FILE_LIMIT_BYTES))


def check(kept: Kept, node: NodeId) -> x509.Certificate:
    """The certificate in ``kept``, if it is of ``node`` and of one of the CAs; raises DataError."""
    certificate = _certificate(kept.certificate)
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey) or node_id_of(key) != node:
        raise DataError(f"{KEPT_FILE}: the certificate is not this node's")
    if not any(_signed(certificate, _certificate(each)) for each in kept.authorities):
        raise DataError(f"{KEPT_FILE}: the certificate is not of the site's CA")
    return certificate


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    key = authority.public_key()
    if not isinstance(key, Ed25519PublicKey):
        return False
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes)
    except InvalidSignature:
        return False
    return True


def _certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise DataError(f"{KEPT_FILE}: no certificate: {error}") from error


def pems(certificates: Sequence[x509.Certificate]) -> tuple[str, ...]:
    """The certificates as the file has them."""
    return tuple(each.public_bytes(Encoding.PEM).decode("ascii") for each in certificates)
