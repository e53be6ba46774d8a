# SPDX-License-Identifier: Apache-2.0
"""Root's own look, before K3s stops here, at whether etcd keeps its quorum without this server.

Nothing that the daemon says counts here: whoever took it over could have the cluster stopped.
"""

from __future__ import annotations

import http.client
import re
import time

from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.errors import MachineError
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.kube import Kube, NeverServedError, RefusedError
from k3sagentd.k3s.quorum import quorum
from k3sagentd.k3s.settings import node_name, told
from k3sagentd.paths import Paths

METRICS = ("127.0.0.1", 2381)
"""etcd's own metrics, without TLS (K3s, pkg/etcd/etcd.go, ``ListenMetricsURLs``)."""
HAS_LEADER = re.compile(rb"^etcd_server_has_leader ([01])$", re.MULTILINE)
METRICS_LIMIT_BYTES = 16 * 1024 * 1024
METRICS_TIMEOUT_S = 3.0
LEADERLESS_S = 30.0
"""An election that can succeed takes less: K3s sets etcd's election timeout to 5 s, of which etcd
waits up to twice as long, and the first may be split."""
LOOK_S = 1.0


def check(paths: Paths, *, running: bool) -> None:
    """Raise MachineError while etcd would, or may, lose its quorum with this server.

    A K3s that does not run, was never ready, or has no quorum, takes no part that could be missed.
    One that is only too busy to answer does.
    """
    if not running or datastore(paths.k3s_data) is not Datastore.ETCD:
        return
    try:
        nodes = [each.node for each in Kube(paths).nodes()]
    except (RefusedError, NeverServedError):
        return
    except MachineError as error:
        if _is_leaderless():
            return
        raise MachineError(
            f"it is not known whether the other servers are a quorum without this one: {error}"
        ) from error
    own = node_name(paths, told(paths, ServerOrAgent.SERVER))
    servers = [each for each in nodes if each.server]
    others = sum(each.ready for each in servers if each.name != own)
    is_member = any(each.name == own for each in servers)
    if is_member and others < (needed := quorum(len(servers))):
        raise MachineError(
            f"{others} of the other servers are ready, {needed} must be before this one stops"
        )


def _is_leaderless() -> bool:
    """Whether etcd here finds no leader, for longer than an election takes."""
    until_s = time.monotonic() + LEADERLESS_S
    while _has_leader() is False:
        if time.monotonic() >= until_s:
            return True
        time.sleep(LOOK_S)
    return False


def _has_leader() -> bool | None:
    """What etcd here says; None where it says nothing."""
    connection = http.client.HTTPConnection(*METRICS, timeout=METRICS_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        found = HAS_LEADER.search(connection.getresponse().read(METRICS_LIMIT_BYTES))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return found[1] == b"1" if found else None
