# SPDX-License-Identifier: Apache-2.0
"""Which server this machine's K3s is pointed at: one that shows the CA that was sealed."""

from __future__ import annotations

import urllib.request
from urllib.parse import urlsplit

from k3sagentd.core.k3s import Datastore
from k3sagentd.discovery.addresses import attachment
from k3sagentd.errors import ConfigError, DataError, MachineError
from k3sagentd.k3s import reach
from k3sagentd.k3s.change_role import is_change
from k3sagentd.k3s.data import datastore, is_removed
from k3sagentd.k3s.order import check_url
from k3sagentd.k3s.trust import NO_ANSWER, insecure
from k3sagentd.k3s.work import Work
from k3sagentd.yaml_files import merge

PING = "https://127.0.0.1:6443/ping"
PING_TIMEOUT_S = 5.0


def find(work: Work) -> str:
    """The server that is configured while it answers with the right CA, else the first that does.

    A change costs an agent a restart and its list of servers, which it keeps for one URL (K3S.md
    8). A member goes on where nobody answers: it has its own list to ask. For who joins, also in
    another role than before, somebody else must answer. Raises MachineError.
    """
    store = datastore(work.paths.k3s_data)
    member = store in (Datastore.ETCD, Datastore.AGENT) and not is_change(work)
    member = member and not is_removed(work.paths.k3s_data)
    present = _configured(work) if member else None
    urls = list(dict.fromkeys([*([present] if present else []), *work.order.servers]))
    own = [] if member else [url for url in urls if _is_own(work, url)]
    try:
        return reach.find([url for url in urls if url not in own], work.order.ca_hash)
    except MachineError as error:
        if member:
            return urls[0]
        said = [*(f"{url} is this machine itself" for url in own), str(error)]
        raise MachineError("; ".join(each for each in said if each)) from error


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
    at = attachment(work.config.interface, work.config.virtual_ip)
    return at is not None and urlsplit(url).hostname == at.address


def pings() -> bool:
    """Whether this machine's own server is up: past whatever it does with its datastore."""
    context = insecure()
    try:
        with urllib.request.urlopen(PING, timeout=PING_TIMEOUT_S, context=context) as response:
            pong: bytes = response.read(16)
            return pong == b"pong"
    except NO_ANSWER:
        return False
