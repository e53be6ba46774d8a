# SPDX-License-Identifier: Apache-2.0
"""Which registration address to join at: the first, in the order given, that is of the cluster.

Nothing is believed but the hash of the CA that was sealed. Addresses that do not answer must not
cost every join their timeout, and one that does must not be asked by everybody: so the next is
begun when the one before failed, or has had its head start (RFC 8305, section 5, at a Pi's pace).
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

from k3sagentd.errors import MachineError
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.trust import NO_ANSWER, insecure, trusting

HEAD_START_S = 2.0
"""How long a preferred address may keep the next one waiting: what a loaded Pi needs for TLS."""
ANSWER_TIMEOUT_S = 10.0
ALL_TIMEOUT_S = 45.0
"""For all of them: 16 addresses that are all dead have had their head starts by then."""
CACERTS_LIMIT_BYTES = 256 * 1024


class UnnamedError(MachineError):
    """A server of the cluster whose certificate does not name the address that it was asked at."""


def find(urls: Sequence[str], ca_hash: str | None) -> str:
    """The first that answers with ``ca_hash``; raises MachineError with what each one said.

    One whose certificate lacks the address is taken only if there is no other: K3s itself would
    not accept it there.
    """
    answers: queue.SimpleQueue[tuple[int, MachineError | None]] = queue.SimpleQueue()
    failed: dict[int, MachineError] = {}
    deadline = time.monotonic() + ALL_TIMEOUT_S
    begun = 0
    while len(failed) < len(urls) and time.monotonic() < deadline:
        if begun < len(urls):
            arguments = (answers, begun, urls[begun], ca_hash)
            # A daemon thread: whoever hangs is left behind, also at the end of the process.
            threading.Thread(target=_ask, args=arguments, daemon=True).start()
            begun += 1
        patience_s = HEAD_START_S if begun < len(urls) else deadline - time.monotonic()
        until = time.monotonic() + patience_s
        while len(failed) < begun:
            try:
                which, error = answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if error is None:
                return urls[which]
            failed[which] = error
    for which, reason in sorted(failed.items()):
        if isinstance(reason, UnnamedError):
            return urls[which]
    silent = MachineError("no answer in time")
    said = [str(failed.get(i, f"{url} cannot be reached: {silent}")) for i, url in enumerate(urls)]
    raise MachineError("; ".join(said))


def _ask(
    answers: queue.SimpleQueue[tuple[int, MachineError | None]],
    which: int,
    url: str,
    ca_hash: str | None,
) -> None:
    try:
        check(url, ca_hash)
        answers.put((which, None))
    except MachineError as error:
        answers.put((which, error))


def check(url: str, ca_hash: str | None) -> None:
    """Raise MachineError unless ``url`` is a server of the cluster whose CA has ``ca_hash``."""
    body = fetch_cacerts(url)
    found = hash_of_cacerts(body)
    if found is None:
        raise MachineError(f"{url}/cacerts is not a certificate")
    if found != ca_hash:
        raise MachineError(f"{url} has CA {found}, but the site's is {ca_hash}")
    _check_name(url, body)


def fetch_cacerts(url: str) -> bytes:
    """What a server shows as its CA; raises MachineError where it has nothing to show."""
    try:
        with urllib.request.urlopen(  # noqa: S310 (https only: order.check_url)
            f"{url}/cacerts", timeout=ANSWER_TIMEOUT_S, context=insecure()
        ) as response:
            body: bytes = response.read(CACERTS_LIMIT_BYTES)
            return body
    except urllib.error.HTTPError as error:
        raise MachineError(f"{url} answers {error.code}") from error
    except NO_ANSWER as error:
        reason = getattr(error, "reason", error)
        raise MachineError(f"{url} cannot be reached: {reason}") from error


def _check_name(url: str, cacerts: bytes) -> None:
    """As K3s connects once it has the CA (K3s, pkg/clientaccess/token.go): verified, by name."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    try:
        context = trusting(cacerts)
        with (
            socket.create_connection((host, port), ANSWER_TIMEOUT_S) as sock,
            context.wrap_socket(sock, server_hostname=host),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        raise UnnamedError(
            f"{url} is of this cluster, but its certificate is not for {host} "
            f"({error.verify_message}); restart K3s on the servers, one after the other"
        ) from error
    except (OSError, ValueError) as error:
        raise MachineError(f"{url} cannot be reached: {error}") from error
