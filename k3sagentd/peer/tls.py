# SPDX-License-Identifier: Apache-2.0
"""TLS between peers: version 1.3, both ends verified against the site's CA, clock ignored.

While a site's token is rotated it has more than one CA; each node shows the certificate of one.

Who is at the other end is its node id: the hash of the public key in its verified certificate.
Host names and addresses mean nothing here.
"""

from __future__ import annotations

import os
import ssl
from asyncio import sslproto
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from k3sagentd.core.words import NodeId
from k3sagentd.errors import PeerError
from k3sagentd.identity import Identity, node_id_of

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: a Pi has no clock at boot, and it decides nothing here."""


BUFFER_BYTES = 32 * 1024
"""Read buffer of one connection: two records of TLS. asyncio takes 256 KiB for each, which with
two connections for each peer would be most of the daemon's memory."""
sslproto.SSLProtocol.max_size = BUFFER_BYTES


def server_context(authorities: Iterable[x509.Certificate], identity: Identity) -> ssl.SSLContext:
    """For the end that listens."""
    return _context(ssl.PROTOCOL_TLS_SERVER, authorities, identity)


def client_context(authorities: Iterable[x509.Certificate], identity: Identity) -> ssl.SSLContext:
    """For the end that connects."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, authorities, identity)


def _context(
    protocol: int, authorities: Iterable[x509.Certificate], identity: Identity
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= NO_CHECK_TIME
    pems = [each.public_bytes(Encoding.PEM).decode("ascii") for each in authorities]
    context.load_verify_locations(cadata="".join(pems))
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # a resumed session would skip the certificate
    _load_key(context, identity)
    return context


def _load_key(context: ssl.SSLContext, identity: Identity) -> None:
    """The ssl module reads keys from files only: give it one that is in memory."""
    fd = os.memfd_create("k3sagentd-key", os.MFD_CLOEXEC)
    try:
        os.write(fd, identity.key_pem + identity.certificate_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def peer_node_id(transport: ssl.SSLObject | None) -> NodeId:
    """The node id at the other end of a connection; raises PeerError."""
    der = transport.getpeercert(binary_form=True) if transport is not None else None
    if der is None:
        raise PeerError("the connection has no client certificate")
    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise PeerError("the certificate has no Ed25519 key")
    return node_id_of(key)


def why_refused(error: BaseException) -> str:
    """A failed handshake, in words; mostly it is another token."""
    reason = getattr(error, "reason", None) or ""
    verify = getattr(error, "verify_message", None)
    if verify or "UNKNOWN_CA" in reason or "CERTIFICATE" in reason or "DECRYPT" in reason:
        return "it has another token (its certificate is not of this site)"
    if "VERSION" in reason or "PROTOCOL" in reason or "WRONG" in reason:
        return "it does not speak TLS 1.3"
    return f"the TLS handshake failed ({reason or type(error).__name__})"
