# SPDX-License-Identifier: Apache-2.0
"""The steps of ``k3sagentd repair-addresses``; which of them are done, and when, is in ``repair``.

Each may be cut off and is done again then. Nothing that K3s wrote is deleted.
"""

from __future__ import annotations

import time

from k3sagentd import site_token
from k3sagentd.config import Config
from k3sagentd.core.k3s import Datastore
from k3sagentd.errors import MachineError, TimedOutError, UnavailableError
from k3sagentd.files import write_atomically
from k3sagentd.k3s import dropin
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.data import ETCD, datastore, has_content, put_aside
from k3sagentd.k3s.install import run
from k3sagentd.k3s.kube import ConflictError, Kube
from k3sagentd.k3s.quorum import removal_trouble
from k3sagentd.k3s.underway import Progress
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import load

ASIDE = "etcd.before-repair"
RESET_TIMEOUT_S = 900.0
API_TIMEOUT_S = 600.0
API_POLL_S = 1.0
STALE_S = 60.0
"""A Node that is not heard is not ready after 40 s (kube-controller-manager), and some."""


def remove(paths: Paths, progress: Progress) -> None:
    """Delete our own Node there, and with it our member; gone is fine."""
    assert progress.server is not None, "only asked where there is one"
    kube = Kube(paths, progress.server)
    nodes = kube.nodes()
    own = next((each for each in nodes if each.node.name == progress.name), None)
    if own is None:
        return
    # With another uid it is ours where it says so: K3s made it anew, in a run that was killed.
    if own.node.uid != progress.uid and (own.node.node is None or own.node.node != progress.node):
        raise MachineError(
            f"the Node {own.node.name} at {progress.server} is not the one that this machine had: "
            "another machine has taken its name"
        )
    if trouble := removal_trouble([each.node for each in nodes], own.node.name):
        raise UnavailableError(trouble)
    kube.delete_node(own)


def move_aside(paths: Paths) -> None:
    """On a disk of its own it cannot be renamed: see ``put_aside``."""
    if has_content(paths.k3s_data / ETCD):
        put_aside(paths.k3s_data / ETCD, ASIDE)


def write(paths: Paths, config: Config, progress: Progress) -> None:
    """Our drop-in with the new address, and where to join; no join trusts on first use."""
    values = load(paths.dropin)
    was, now = values["node-ip"], progress.address
    names = values.get("tls-san")
    names = names if isinstance(names, list) else [names] if names else []
    values["tls-san"] = list(dict.fromkeys([now, *(each for each in names if each != was)]))
    values["node-ip"] = now
    for key in ("cluster-init", "server"):
        values.pop(key, None)
    if progress.server is not None:
        values["server"] = progress.server
        if not paths.k3s_token.read_text().startswith("K10"):
            ca = hash_of_cacerts((paths.k3s_data / "server/tls/server-ca.crt").read_bytes())
            token = site_token.load(config.token_file).decode()
            write_atomically(paths.k3s_token, f"K10{ca}::server:{token}\n".encode(), mode=0o600)
    write_atomically(paths.dropin, dropin.render(values), mode=0o600)


def cluster_reset(paths: Paths, config: Config) -> None:
    """K3s's documented way; its flag of an attempt that was cut off goes first, as it asks for.

    K3s, pkg/etcd/etcd.go Reset: sets the flag, starts etcd as a cluster of its own, ends with 0.
    """
    (paths.k3s_data / "server/db/reset-flag").unlink(missing_ok=True)
    run(
        [str(config.install.binary), "server", "--cluster-reset"],
        timeout_s=RESET_TIMEOUT_S,
        what="k3s server --cluster-reset",
    )


def await_member(paths: Paths) -> None:
    """Until K3s has data of etcd again: before that it looks like no server at all."""
    deadline = time.monotonic() + API_TIMEOUT_S
    while datastore(paths.k3s_data) is not Datastore.ETCD:
        if time.monotonic() > deadline:
            raise TimedOutError("K3s has not joined yet (journalctl -u k3s); run it again")
        time.sleep(API_POLL_S)


def forget_others(paths: Paths, progress: Progress, *, late: bool) -> None:
    """Delete the Nodes of the servers that are no members any more; each joins as a new one.

    Those are all that were there when K3s came up. Where we look ``late``, after a kill, some may
    have joined since: then those that are not ready once that can be told.
    """
    waited = False
    stale: set[str] | None = None
    deadline = time.monotonic() + API_TIMEOUT_S
    while True:
        try:
            kube = Kube(paths)
            found = [
                each
                for each in kube.nodes()
                if each.node.server and each.node.name != progress.name
            ]
            if late and not waited:
                time.sleep(STALE_S)
                waited = True
                continue
            if stale is None:
                stale = {each.node.uid for each in found if not (late and each.node.ready)}
            for each in found:
                if each.node.uid in stale:
                    kube.delete_node(each)
            return
        except ConflictError:
            pass  # its state was written meanwhile
        except MachineError as error:
            if time.monotonic() > deadline:
                raise TimedOutError(f"K3s is not ready here: {error}; run it again") from error
        time.sleep(API_POLL_S)
