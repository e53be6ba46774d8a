# SPDX-License-Identifier: Apache-2.0
"""What follows from the token: the site id, the election key and the site's CA (design, 4.1).

scrypt (RFC 7914) makes guessing dear, HKDF (RFC 5869) gives one key per use. Everybody with the
token derives the same; nothing here is ever sent, except the site id.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import NameOID

SALT = b"k3sagentd site key, version 1"
SCRYPT_N = 2**15
"""32 MiB with r = 8: what RFC 7914 calls interactive use, and what a Pi with 512 MB can spare."""
NOT_BEFORE = datetime.datetime(1970, 1, 1)  # naive UTC: cryptography 38
NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59)  # RFC 5280, 4.1.2.5
CA_NAME = "k3sagentd site"


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """The keys of one site."""

    site_id: str
    """Public; 16 hex characters that reveal nothing about the token."""
    election_key: bytes
    ca_key: Ed25519PrivateKey
    ca_certificate: x509.Certificate
    agent_token: str
    """K3s's agent token: joins agents, and says nothing of the token that joins servers."""


def mdns_name(site_id: str) -> str:
    """The cluster's name on the local network, in every server's certificate."""
    return f"k3s-{site_id[:6]}.local"


def derive(token: bytes) -> SiteKeys:
    """Derive the keys of the site that has ``token``. Takes about 0.1 s and 32 MiB."""
    root = Scrypt(salt=SALT, length=32, n=SCRYPT_N, r=8, p=1).derive(token)
    ca_key = Ed25519PrivateKey.from_private_bytes(_expand(root, b"k3sagentd site CA", 32))
    return SiteKeys(
        site_id=_expand(root, b"k3sagentd site id", 8).hex(),
        election_key=_expand(root, b"k3sagentd election key", 32),
        ca_key=ca_key,
        ca_certificate=_ca_certificate(ca_key),
        agent_token=_expand(root, b"k3sagentd K3s agent token", 32).hex(),
    )


def _expand(root: bytes, label: bytes, length: int) -> bytes:
    return HKDFExpand(algorithm=hashes.SHA256(), length=length, info=label).derive(root)


def _ca_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    """The same bytes on every node: fixed serial and dates, and Ed25519 is deterministic."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, algorithm=None)
    )


def leaf_certificate(keys: SiteKeys, key: Ed25519PrivateKey, common_name: str) -> x509.Certificate:
    """A node's certificate, signed by the site CA, good for both ends of a connection."""
    ca_public = keys.ca_key.public_key()
    eku = [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(keys.ca_certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(eku), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_public), critical=False
        )
        .sign(keys.ca_key, algorithm=None)
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
