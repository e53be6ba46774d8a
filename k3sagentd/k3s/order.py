# SPDX-License-Identifier: Apache-2.0
"""Orders and results: the two files between the daemon and root, and root's distrust.

Whoever takes over the daemon can write any order; so an order holds no path, command or secret,
and each field has a form that is checked here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from k3sagentd import schema
from k3sagentd.config import HOST, HOST_LIMIT
from k3sagentd.core.k3s import RELEASE, Action, Order, Result
from k3sagentd.core.registration import SERVERS_LIMIT
from k3sagentd.errors import DataError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.k3s import handed
from k3sagentd.k3s.flags import SHARED, plain
from k3sagentd.paths import Paths

ORDER_LIMIT_BYTES = 16 * 1024
RESULT_LIMIT_BYTES = 64 * 1024
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
"""Labels of RFC 1123, as Kubernetes wants node names. Ours have one; a Node that was there before
us may have more."""
NAME_LIMIT = 253
HASH = re.compile(r"[0-9a-f]{64}")
INSTANCE = re.compile(r"[0-9a-f]{0,64}")
"""A run of the daemon, and a node id: hex."""
MARK = re.compile(r"[0-9a-f]{16}")
FLAG_VALUE = re.compile(r"[\x20-\x7e]{0,1024}")
FLAG_TEXT = re.compile(r"(?!-)[\x20-\x7e]{0,1024}")
"""One value of a flag, which K3s must not take for another option."""
URL = re.compile(
    rf"https://(?:(?P<host>{HOST.pattern})|\[(?P<ipv6>[0-9A-Fa-f:.]{{2,45}})\]):(?P<port>[1-9][0-9]{{0,4}})"
)
PORT_LIMIT = 65535
EPOCH_LIMIT = 10**6
"""Of epochs, generations, attempts."""


def write_order(paths: Paths, order: Order) -> None:
    """For the daemon; raises OSError."""
    write_atomically(paths.order, schema.dumps(order, indent=1).encode(), durable=False)


def take_order(paths: Paths) -> Order | None:
    """For root: take the order away and return it; None where there is none. Raises DataError."""
    data = handed.take(paths.order, ORDER_LIMIT_BYTES)
    if data is None:
        return None
    order = schema.loads(Order, data)
    check(order)
    return order


def check(order: Order) -> None:
    """Raise DataError where a field has not the form that it must have."""
    for name in ("epoch", "generation", "attempt"):
        count = getattr(order, name)
        if not 0 <= count < EPOCH_LIMIT:
            raise DataError(f"{name} is {count!r:.80}, not 0 to {EPOCH_LIMIT - 1}")
    if len(order.node_name) > NAME_LIMIT or not NAME.fullmatch(order.node_name):
        raise DataError(f"node_name is {order.node_name!r:.80}, not labels of RFC 1123")
    if len(order.servers) > SERVERS_LIMIT:
        raise DataError(f"{len(order.servers)} servers; at most {SERVERS_LIMIT}")
    for url in order.servers:
        check_url(url)
    if order.ca_hash is not None and not HASH.fullmatch(order.ca_hash):
        raise DataError(f"ca_hash is {order.ca_hash!r:.80}, not 64 hex characters")
    if order.action is Action.JOIN and (not order.servers or order.ca_hash is None):
        raise DataError("an order to join needs servers and ca_hash")
    if order.k3s_version is not None and not RELEASE.fullmatch(order.k3s_version):
        raise DataError(f"k3s_version is {order.k3s_version!r:.80}")
    if not INSTANCE.fullmatch(order.instance):
        raise DataError(f"instance is {order.instance!r:.80}")
    if not INSTANCE.fullmatch(order.node):
        raise DataError(f"node is {order.node!r:.80}")
    if order.action in (Action.INIT, Action.STAND_DOWN) and not order.node:
        raise DataError(f"an order to {order.action} needs node")
    if order.hardware is not None and not MARK.fullmatch(order.hardware):
        raise DataError(f"hardware is {order.hardware!r:.80}")
    for flag, value in order.shared_flags.items():
        if flag not in SHARED or not _is_flag_value(value):
            raise DataError(f"shared flag {flag!r:.40} is {value!r:.80}")


def _is_flag_value(canonical: str) -> bool:
    """Whether K3s may be given what the text stands for: true or false, a text, a list of texts."""
    if not FLAG_VALUE.fullmatch(canonical):
        return False
    try:
        value: Any = plain(canonical)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, bool):
        return True
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(each, str) and FLAG_TEXT.fullmatch(each) for each in texts)


def check_url(url: str) -> None:
    """Raise DataError unless ``url`` is ``https://host:port`` and nothing else."""
    match = URL.fullmatch(url)
    if match is None or len(match["host"] or "") > HOST_LIMIT or int(match["port"]) > PORT_LIMIT:
        raise DataError(f"server is {url!r:.80}, not https://host:port")
    if match["ipv6"] is not None:
        try:
            ipaddress.IPv6Address(match["ipv6"])
        except ValueError:
            raise DataError(f"server is {url!r:.80}, not https://[IPv6 address]:port") from None


def write_result(paths: Paths, result: Result) -> None:
    """For root."""
    write_atomically(paths.result, schema.dumps(result, indent=1).encode(), durable=False)


def read_result(paths: Paths) -> Result | None:
    """For the daemon; None while there is none. Raises DataError, OSError."""
    try:
        return schema.loads(Result, read_bounded(paths.result, RESULT_LIMIT_BYTES))
    except FileNotFoundError:
        return None
