# SPDX-License-Identifier: Apache-2.0
"""What is known and wanted of the running cluster: its Nodes, its servers, and who may decide.

After the seal K3s's own etcd and API are the source of truth (design, 4.6). Only root on a server
speaks to the API; the core sees what root saw (``ClusterView``) and asks for changes (``Errand``).
Plain data.
"""

from __future__ import annotations

from dataclasses import dataclass

from k3sagentd.core.k3s import Outcome, release_key
from k3sagentd.core.words import NodeId, short

LEASE = "k3sagentd"
"""Name of the Lease in ``kube-system`` whose holder alone decides about servers and Nodes."""
ROSTER_ANNOTATION = "k3sagentd/roster"
"""On the Lease: the roster as JSON, so that it changes with the Lease's resourceVersion or not."""
NODE_LABEL = "k3sagentd/node-id"
"""On each Node that we made: the id of the machine's identity."""
HARDWARE_LABEL = "k3sagentd/hardware"
"""On each Node that we made: a mark of its hardware, which a new image does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Which machines are to be servers. Revision 0 is what the bootstrap log says."""

    revision: int
    servers: tuple[NodeId, ...]
    init: NodeId
    """The init node of the bootstrap log that it continues; a cluster that is adopted may still
    have the roster of an earlier life of the site."""

    def describe(self) -> str:
        """As people read it."""
        return f"roster {self.revision} of {','.join(map(short, self.servers))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeNode:
    """A Node object, as far as it matters here."""

    name: str
    uid: str
    node: NodeId | None
    """By ``NODE_LABEL``; None for a Node that was there before us."""
    hardware: str | None
    """By ``HARDWARE_LABEL``."""
    server: bool
    """It has the etcd role: deleting it removes its member (K3S.md 7)."""
    ready: bool
    """Its condition Ready is True; NotReady and Unknown are not."""
    cordoned: bool = False
    """It takes no new pods: it is being drained, or was."""
    release: str | None = None
    """K3s's release, as its kubelet tells it; None for what is no release (``k3s.RELEASE``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """One look at the API."""

    nodes: tuple[KubeNode, ...]
    lease_version: str | None = None
    """resourceVersion of the Lease; None where there is none yet."""
    holder: NodeId | None = None
    """Who holds the Lease; None where nobody does."""
    roster: Roster | None = None
    """None: never written, so revision 0 stands."""

    @property
    def release(self) -> str | None:
        """The oldest K3s release of the servers, None while none is told: what joins must not be
        newer than a server (kubernetes.io/releases/version-skew-policy)."""
        told = [each.release for each in self.nodes if each.server and each.release]
        return min(told, key=release_key, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What root is to do in the cluster's API. Holds no secret, path or command.

    In this order: take the Lease, write the roster with it, drain, remove, release; then look.
    """

    serial: int
    """Counts the errands of one run of the daemon."""
    instance: str
    """The run of the daemon that gave it."""
    node: NodeId
    """Our own id: the holder that is written."""
    hold: bool = False
    """Take or keep the Lease. Without it, only a look; needed for all that follows."""
    lease_version: str | None = None
    """The Lease is written only if this is its resourceVersion (None: only if there is none)."""
    roster: Roster | None = None
    """Write this roster along with the Lease."""
    drain: str | None = None
    """Drain the Node of this name."""
    remove: str | None = None
    """Delete the Node of this name, and with it its etcd member and its node password."""
    uid: str | None = None
    """Only if the Node has this uid: not what took its name meanwhile."""
    dead: bool = True
    """Only if the Node is not ready."""
    release: bool = False
    """Give the Lease up at the end."""

    def describe(self) -> str:
        """As people read it."""
        parts = ["hold the lease"] if self.hold else []
        if self.roster is not None:
            parts.append(self.roster.describe())
        if self.drain:
            parts.append(f"drain {self.drain}")
        if self.remove:
            parts.append(f"remove {self.remove}")
        if self.release:
            parts.append("release the lease")
        return f"errand {self.serial}: {', '.join(parts) or 'look'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrandResult:
    """What became of an errand; the view is of after it, None where the API did not answer."""

    errand: Errand
    outcome: Outcome
    """DONE or FAILED."""
    reason: str | None = None
    """For a failure: what failed, found, expected."""
    view: ClusterView | None = None
