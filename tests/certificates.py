# SPDX-License-Identifier: Apache-2.0
"""A TLS server with a CA of its own, for tests: one certificate that is both."""

import ssl
import subprocess
from pathlib import Path


def serving(directory: Path, address: str) -> ssl.SSLContext:
    """For a server at ``address``; what it shows as its CA is in ``directory/ca.crt``."""
    directory.mkdir(parents=True, exist_ok=True)
    key, certificate = directory / "ca.key", directory / "ca.crt"
    if not certificate.exists():
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-subj", "/CN=k3s"),
                *("-addext", f"subjectAltName=IP:{address}", "-keyout", key, "-out", certificate),
            ],
            check=True,
            capture_output=True,
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
