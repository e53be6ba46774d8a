# SPDX-License-Identifier: Apache-2.0
"""Whom K3s's own ports are believed: nobody, or who has a certificate by the cluster's CA."""

from __future__ import annotations

import http.client
import ssl

NO_ANSWER = (OSError, http.client.HTTPException)
"""What ``urllib`` raises where nobody answers, or not in HTTP: its own errors are OSErrors."""


def insecure() -> ssl.SSLContext:
    """No verification: the hash of ``/cacerts`` is what is compared, not a chain."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def trusting(cacerts: bytes) -> ssl.SSLContext:
    """Trust these certificates (PEM) alone; raises ssl.SSLError, or ValueError for no text.

    By the rules of Go, which made them: ``ssl.create_default_context`` has had stricter ones since
    Python 3.13 (``VERIFY_X509_STRICT``), which a CA of the owner's need not keep.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=cacerts.decode("ascii"))
    return context
