# SPDX-License-Identifier: Apache-2.0
"""The stand-in's certificates: a server CA made by the first server, a leaf for each."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from k3sagentd.files import write_atomically


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
    )


def make_ca(tls: Path) -> None:
    """A new server CA in ``tls``, unless there is one."""
    if (tls / "server-ca.crt").exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    stamp = int(datetime.datetime.now(datetime.UTC).timestamp())
    name = f"k3s-server-ca@{stamp}"
    certificate = (
        _builder(name, _name(name), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_ca(tls, certificate.public_bytes(Encoding.PEM), _pem(key))


def write_ca(tls: Path, certificate: bytes, key: bytes) -> None:
    """Put a CA, made here or given by the cluster, into ``tls``."""
    tls.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(tls / "server-ca.key", key, mode=0o600)
    write_atomically(tls / "server-ca.crt", certificate)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def serving_context(tls: Path, node_ip: str) -> ssl.SSLContext:
    """For :6443, with a leaf of the CA."""
    ca = x509.load_pem_x509_certificate((tls / "server-ca.crt").read_bytes())
    ca_key = load_pem_private_key((tls / "server-ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey), "made above"
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.IPAddress(ipaddress.ip_address(each)) for each in {node_ip, "127.0.0.1"}]
    leaf = (
        _builder("k3s", ca.subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    bundle = tls / "serving.pem"
    write_atomically(bundle, _pem(key) + leaf.public_bytes(Encoding.PEM), mode=0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle)
    return context
