# SPDX-License-Identifier: Apache-2.0
"""Which server this machine's K3s is pointed at: one that shows the CA that was sealed."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from k3sagentd.core.k3s import Datastore
from k3sagentd.discovery.addresses import attachment
from k3sagentd.errors import ConfigError, DataError, MachineError
from k3sagentd.k3s import probe
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.change_role import is_change
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.order import check_url
from k3sagentd.k3s.work import Work
from k3sagentd.yaml_files import merge

CACERTS_TIMEOUT_S = 10.0
CACERTS_LIMIT_BYTES = 256 * 1024
PING_TIMEOUT_S = 5.0


def find(work: Work) -> str:
    """The server that is configured while it answers with the right CA, else the first that does.

    A change costs an agent a restart and its list of servers, which it keeps for one URL (K3S.md
    8). A member goes on where nobody answers: it has its own list to ask. For who joins, also in
    another role than before, somebody else must answer. Raises MachineError.
    """
    store = datastore(work.paths.k3s_data)
    member = store in (Datastore.ETCD, Datastore.AGENT) and not is_change(work)
    present = _configured(work) if member else None
    reasons = []
    for url in dict.fromkeys([*([present] if present else []), *work.order.servers]):
        if not member and _is_own(work, url):
            reasons.append(f"{url} is this machine itself")
            continue
        try:
            found = fetch_ca_hash(url)
        except MachineError as error:
            reasons.append(str(error))
            continue
        if found == work.order.ca_hash:
            return url
        reasons.append(f"{url} has CA {found}, but the site's is {work.order.ca_hash}")
    if member:
        return present or work.order.servers[0]
    raise MachineError("; ".join(reasons))


def _configured(work: Work) -> str | None:
    """The server that K3s is told now, if it could be one of an order's."""
    try:
        url = merge(work.paths.k3s_config).values.get("server")
        if isinstance(url, str):
            check_url(url)
            return url
    except (ConfigError, DataError):
        pass
    return None


def _is_own(work: Work, url: str) -> bool:
    at = attachment(work.config.interface)
    return at is not None and urlsplit(url).hostname == at.address


def fetch_ca_hash(url: str) -> str:
    """The hash of a server's CA; raises MachineError where it has none to show."""
    found = hash_of_cacerts(_get(f"{url}/cacerts", CACERTS_TIMEOUT_S))
    if found is None:
        raise MachineError(f"{url}/cacerts is not a certificate")
    return found


def pings() -> bool:
    """Whether this machine's own server is up: past whatever it does with its datastore."""
    try:
        return _get("https://127.0.0.1:6443/ping", PING_TIMEOUT_S) == b"pong"
    except MachineError:
        return False


def _get(url: str, timeout_s: float) -> bytes:
    context: ssl.SSLContext = probe.insecure()
    try:
        with urllib.request.urlopen(  # noqa: S310 (https only: order.check_url)
            url, timeout=timeout_s, context=context
        ) as response:
            body: bytes = response.read(CACERTS_LIMIT_BYTES)
    except urllib.error.HTTPError as error:
        raise MachineError(f"{url} answers {error.code}") from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise MachineError(f"{url} cannot be reached: {reason}") from error
    return body
