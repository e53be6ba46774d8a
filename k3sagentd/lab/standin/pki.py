# SPDX-License-Identifier: Apache-2.0
"""The stand-in's certificates, in the files that K3s has them in (``server/tls``).

Two CAs, one for servers and one for clients, made by the first server and given to those that
join; under them a serving certificate, the administrator's, and one for each kubelet.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import ssl
from collections.abc import Iterable
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
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from k3sagentd.files import write_atomically

SHARED = {
    "ServerCA": "server-ca.crt",
    "ServerCAKey": "server-ca.key",
    "ClientCA": "client-ca.crt",
    "ClientCAKey": "client-ca.key",
}
"""What ``server-bootstrap`` gives to a server that joins, and the file of each."""
MASTERS, NODES = "system:masters", "system:nodes"
"""Groups of the Kubernetes API: a certificate's organisation."""


def make_cas(tls: Path) -> None:
    """The two CAs in ``tls``, each unless it is there."""
    tls.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = int(datetime.datetime.now(datetime.UTC).timestamp())
    for which in ("server", "client"):
        if (tls / f"{which}-ca.crt").exists():
            continue
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"k3s-{which}-ca@{stamp}")
        public = key.public_key()
        certificate = (
            _builder(name, name, public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_atomically(tls / f"{which}-ca.key", _pem(key), mode=0o600)
        write_atomically(tls / f"{which}-ca.crt", certificate.public_bytes(Encoding.PEM))


def export(tls: Path) -> bytes:
    """The CAs with their keys, for a server that joins."""
    files = {
        key: {"Content": base64.b64encode((tls / name).read_bytes()).decode()}
        for key, name in SHARED.items()
    }
    return json.dumps(files).encode()


def adopt(tls: Path, exported: bytes) -> None:
    """Put the CAs of a cluster into ``tls``."""
    tls.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = json.loads(exported)
    for key, name in SHARED.items():
        write_atomically(tls / name, base64.b64decode(files[key]["Content"]), mode=0o600)


def make_admin(tls: Path) -> None:
    """The administrator's certificate, unless it is there and of this CA."""
    path = tls / "client-admin.crt"
    if path.exists() and path.read_bytes().endswith((tls / "client-ca.crt").read_bytes()):
        return
    certificate, key = client_certificate(tls, "system:admin", MASTERS)
    write_atomically(tls / "client-admin.key", key, mode=0o600)
    write_atomically(path, certificate, mode=0o600)


def client_certificate(tls: Path, user: str, group: str) -> tuple[bytes, bytes]:
    """A certificate of the client CA with that CA behind it, and its key."""
    key, leaf = _leaf(tls, "client", _name(user, group), [], ExtendedKeyUsageOID.CLIENT_AUTH)
    return leaf + (tls / "client-ca.crt").read_bytes(), key


def serving_context(tls: Path, sans: Iterable[str]) -> ssl.SSLContext:
    """For :6443: a certificate for ``sans`` (addresses and names), and clients' ones if shown."""
    names: list[x509.GeneralName] = []
    for each in dict.fromkeys(sans):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(each)))
        except ValueError:
            names.append(x509.DNSName(each))
    name = _name("kube-apiserver")
    key, leaf = _leaf(tls, "server", name, names, ExtendedKeyUsageOID.SERVER_AUTH)
    bundle = tls / "serving.pem"
    write_atomically(bundle, key + leaf + (tls / "server-ca.crt").read_bytes(), mode=0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle)
    context.load_verify_locations(tls / "client-ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(
    ca: Path, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """For a client that trusts ``ca`` and shows ``certificate``."""
    context = ssl.create_default_context(cafile=str(ca))
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _name(user: str, group: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
    if group is not None:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    return x509.Name(parts)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _leaf(
    tls: Path,
    which: str,
    subject: x509.Name,
    names: list[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
) -> tuple[bytes, bytes]:
    """Key and certificate, as PEM."""
    ca = x509.load_pem_x509_certificate((tls / f"{which}-ca.crt").read_bytes())
    ca_key = load_pem_private_key((tls / f"{which}-ca.key").read_bytes(), None)
    ca_public = ca.public_key()
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey), "made above"
    assert isinstance(ca_public, ec.EllipticCurvePublicKey), "made above"
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_public)
    builder = (
        _builder(subject, ca.subject, key.public_key())
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(issuer_key, critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _pem(key), builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
