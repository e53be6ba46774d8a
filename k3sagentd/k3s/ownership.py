# SPDX-License-Identifier: Apache-2.0
"""Whose K3s this machine's is: ours, or somebody's that was there before us (adopted).

An adopted K3s stays as its operator set it up: no drop-in, no token file, no install, no restart.
"""

from __future__ import annotations

import socket

from k3sagentd.config import Config
from k3sagentd.core.k3s import Datastore
from k3sagentd.k3s import units
from k3sagentd.k3s.data import datastore
from k3sagentd.paths import Paths

K3S_PORT = 6443
KUBELET_PORT = 10248
CONNECT_S = 2.0


def is_adopted(paths: Paths, config: Config) -> bool:
    """Whether K3s has data here and something that runs it, and our install never began.

    Data without anything that runs it (a new system over an old disk) is taken over as it is.
    Method ``exec`` has no units: there all data that we did not begin was somebody's.
    """
    if paths.installed.exists() or datastore(paths.k3s_data) is Datastore.NONE:
        return False
    return config.install.method == "exec" or bool(units.named(paths)) or answers()


def answers() -> bool:
    """Whether some K3s, whoever runs it, listens on this machine."""
    return any(_listens(port) for port in (K3S_PORT, KUBELET_PORT))


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), CONNECT_S):
            return True
    except OSError:
        return False
