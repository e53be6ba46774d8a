# SPDX-License-Identifier: Apache-2.0
"""How K3s's own ports are asked: straight, and believing nobody, or who has a certificate by the
cluster's CA."""

from __future__ import annotations

import http.client
import ssl
import urllib.request


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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes where it was meant to go."""

    def redirect_request(self, *_: object) -> None:
        """None: the redirection is an answer like any other."""


def straight(context: ssl.SSLContext | None = None) -> urllib.request.OpenerDirector:
    """Opens a URL of this network: neither proxies nor redirections see what is asked.

    The unit may have ``https_proxy`` for the download of K3s. Python heeds no network in
    ``no_proxy``, and networks are what K3s's documentation has people put there.
    """
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=context),
        _NoRedirect(),
    )


def no_http(error: http.client.HTTPException) -> str:
    """What to say of an answer that is none; what stood in it is not repeated."""
    return f"the answer is not HTTP, or is cut off ({type(error).__name__})"
