# SPDX-License-Identifier: Apache-2.0
"""Errands: what root does in the cluster's API for the daemon, and root's distrust of them.

Whoever takes over the daemon can write any errand. So it holds no secret, path or command, each
field has a form that is checked here, and whatever it asks for, nothing is removed that would
cost the quorum of etcd.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from k3sagentd import schema
from k3sagentd.config import load_config
from k3sagentd.core.cluster import ClusterView, Errand, ErrandResult
from k3sagentd.core.k3s import Outcome
from k3sagentd.errors import ConfigError, DataError, K3sagentdError, MachineError, fault
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.k3s import handed
from k3sagentd.k3s.facts import write_facts
from k3sagentd.k3s.install import run as run_program
from k3sagentd.k3s.kube import (
    NODE_ID,
    ConflictError,
    FoundLease,
    Kube,
    check_roster,
)
from k3sagentd.k3s.order import INSTANCE
from k3sagentd.k3s.quorum import removal_trouble
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

ERRAND_LIMIT_BYTES = 16 * 1024
RESULT_LIMIT_BYTES = 4 * 1024 * 1024  # a view of some ten thousand Nodes
SERIAL_LIMIT = 10**9
NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
"""A subdomain of RFC 1123: a Node that was there before us may be named ``pi.lan``."""
UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
VERSION = re.compile(r"[0-9A-Za-z._-]{1,64}")
"""A resourceVersion: opaque to clients."""
DRAIN_TIMEOUT_S = 120


# --- the two files --------------------------------------------------------------------------


def write_errand(paths: Paths, errand: Errand) -> None:
    """For the daemon; raises OSError."""
    write_atomically(paths.errand, schema.dumps(errand, indent=1).encode(), durable=False)


def take_errand(paths: Paths) -> Errand | None:
    """For root: take the errand away and return it; None where there is none. Raises DataError."""
    data = handed.take(paths.errand, ERRAND_LIMIT_BYTES)
    if data is None:
        return None
    errand = schema.loads(Errand, data)
    check(errand)
    return errand


def check(errand: Errand) -> None:
    """Raise DataError where a field has not the form that it must have."""
    if not 0 <= errand.serial < SERIAL_LIMIT:
        raise DataError(f"serial is {errand.serial}")
    if not INSTANCE.fullmatch(errand.instance):
        raise DataError(f"instance is {errand.instance!r:.80}")
    if not NODE_ID.fullmatch(errand.node):
        raise DataError(f"node is {errand.node!r:.80}, which is no node id")
    if errand.lease_version is not None and not VERSION.fullmatch(errand.lease_version):
        raise DataError(f"lease_version is {errand.lease_version!r:.80}")
    for field in ("drain", "remove"):
        name = getattr(errand, field)
        if name is not None and not NAME.fullmatch(name):
            raise DataError(f"{field} is {name!r:.80}, not a name of RFC 1123")
    if errand.uid is not None and not UID.fullmatch(errand.uid):
        raise DataError(f"uid is {errand.uid!r:.80}")
    if errand.roster is not None:
        check_roster(errand.roster)
    changes = errand.roster, errand.drain, errand.remove, errand.release or None
    if not errand.hold and any(each is not None for each in changes):
        raise DataError("an errand that changes something must hold the lease")
    if errand.remove is not None and errand.uid is None:
        raise DataError("an errand that removes a Node needs its uid")


def write_result(paths: Paths, result: ErrandResult) -> None:
    """For root."""
    write_atomically(paths.errand_result, schema.dumps(result, indent=1).encode(), durable=False)


def read_result(paths: Paths) -> ErrandResult | None:
    """For the daemon; None while there is none. Raises DataError, OSError."""
    try:
        data = read_bounded(paths.errand_result, RESULT_LIMIT_BYTES)
    except FileNotFoundError:
        return None
    return schema.loads(ErrandResult, data)


# --- what root does -------------------------------------------------------------------------


def run(paths: Paths) -> None:
    """Carry out the errand that is there, if any; what became of it is in its result."""
    errand = take_errand(paths)
    if errand is None:
        return
    try:
        result = carry_out(paths, errand)
    except Exception as error:
        log.exception("%s failed", errand.describe())
        result = ErrandResult(errand=errand, outcome=Outcome.FAILED, reason=fault(error))
    if result.reason is not None:
        log.warning("%s failed: %s", errand.describe(), result.reason)
    elif errand.drain or errand.remove or errand.roster:
        log.info("%s: done", errand.describe())
    _look_at_the_machine(paths)
    write_result(paths, result)


def _look_at_the_machine(paths: Paths) -> None:
    """A server's first errand comes when its K3s is ready: now its data can be seen, which was not
    there when the order ended."""
    try:
        write_facts(paths)
    except (ConfigError, OSError) as error:
        log.warning("the facts about this machine are not renewed: %s", error)


def carry_out(paths: Paths, errand: Errand) -> ErrandResult:
    """Do it, in the order that ``Errand`` gives, and look; never raises what is foreseen."""
    try:
        kube = Kube(paths)
        view: ClusterView | None = look(kube)
    except MachineError as error:
        return ErrandResult(errand=errand, outcome=Outcome.FAILED, reason=str(error))
    reason = None
    if errand.hold:
        try:
            _act(paths, kube, errand)
        except (K3sagentdError, OSError) as error:
            reason = str(error)
        try:
            view = look(kube)
        except MachineError as error:
            reason, view = reason or str(error), None
    outcome = Outcome.FAILED if reason else Outcome.DONE
    return ErrandResult(errand=errand, outcome=outcome, reason=reason, view=view)


def look(kube: Kube) -> ClusterView:
    """What the API says now; raises MachineError."""
    lease = kube.lease()
    return ClusterView(
        nodes=tuple(each.node for each in kube.nodes()),
        lease_version=lease.version if lease else None,
        holder=lease.holder if lease else None,
        roster=lease.roster if lease else None,
    )


def _act(paths: Paths, kube: Kube, errand: Errand) -> None:
    lease = _hold(kube, errand)
    if errand.drain is not None and _drain(paths, kube, errand.drain):
        # That took its time: who has taken the Lease meanwhile decides now.
        lease = kube.write_lease(lease, errand.node, None)
    if errand.remove is not None:
        _remove(kube, errand)
    if errand.release:
        kube.write_lease(lease, None, None)


def _hold(kube: Kube, errand: Errand) -> FoundLease:
    found = kube.lease()
    version = found.version if found else None
    if version != errand.lease_version:
        holder = found.holder if found else None
        raise ConflictError(
            f"the Lease has version {version or 'none'}, held by {holder or 'nobody'}; expected "
            f"{errand.lease_version or 'none'}"
        )
    return kube.write_lease(found, errand.node, errand.roster)


def _drain(paths: Paths, kube: Kube, name: str) -> bool:
    """Move what runs on the Node elsewhere; False where there is no such Node any more."""
    if not any(each.node.name == name for each in kube.nodes()):
        return False
    command = [str(_binary(paths)), "kubectl", "drain", name, "--ignore-daemonsets"]
    command += ["--delete-emptydir-data", "--force", f"--timeout={DRAIN_TIMEOUT_S}s"]
    run_program(command, timeout_s=DRAIN_TIMEOUT_S + 30, what=f"kubectl drain {name}")
    return True


def _binary(paths: Paths) -> Path:
    """K3s, which has kubectl inside; raises ConfigError."""
    return load_config(paths).install.binary


def _remove(kube: Kube, errand: Errand) -> None:
    """Delete the Node, with its etcd member and node password (K3S.md 7); gone is fine."""
    nodes = kube.nodes()
    found = next((each for each in nodes if each.node.name == errand.remove), None)
    if found is None:
        return
    node = found.node
    if node.uid != errand.uid:
        raise MachineError(
            f"the Node {node.name} has uid {node.uid}, not {errand.uid}: it is another one now"
        )
    if node.node == errand.node:
        raise MachineError(f"the Node {node.name} is of this machine; another server removes it")
    if errand.dead and node.ready:
        raise MachineError(f"the Node {node.name} is ready, not dead; it stays")
    if trouble := removal_trouble([each.node for each in nodes], node.name):
        raise MachineError(trouble)
    kube.delete_node(found)
