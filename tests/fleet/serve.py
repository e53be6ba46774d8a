# SPDX-License-Identifier: Apache-2.0
"""The fleet's own web: APT repository, install script and binary, over https on the wire.

Run inside the switch's namespace: ``python -m tests.fleet.serve DIRECTORY``.
"""

import datetime
import ipaddress
import ssl
import sys
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from k3sagentd.lab import network

HOST = "site.fleet"


def make_certificate(directory: Path) -> None:
    """A certificate that is its own authority: machines trust ``fleet.crt``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    names = [x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address(network.GATEWAY))]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "fleet.key").write_bytes(pem)
    (directory / "fleet.crt").write_bytes(certificate.public_bytes(Encoding.PEM))


def main(directory: Path) -> None:
    """Serve for ever."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "fleet.crt", directory / "fleet.key")
    app = web.Application()
    app.router.add_static("/", directory / "www")
    web.run_app(
        app, host=network.GATEWAY, port=443, ssl_context=context, print=None, access_log=None
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
