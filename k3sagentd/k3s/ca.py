# SPDX-License-Identifier: Apache-2.0
"""The hash of a cluster's CA: what stands in K3s's secure token, and what names a cluster here."""

from __future__ import annotations

import hashlib
import re

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)


def hash_of_cacerts(body: bytes) -> str | None:
    """The hash that stands in a secure token (K3s, pkg/clientaccess/token.go); None for no PEM.

    Of one certificate the body is hashed as it is, of a bundle the DER of its root, the last.
    """
    certificates = CERTIFICATE.findall(body)
    if not certificates:
        return None
    if len(certificates) == 1:
        return hashlib.sha256(body).hexdigest()
    try:
        root = x509.load_pem_x509_certificate(certificates[-1])
    except ValueError:
        return None
    return hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()
