# SPDX-License-Identifier: Apache-2.0
"""The clusters of a simulated site: etcd's members, Node objects and the Lease, as root sees them.

Keeps to K3S.md 4, 7 and to ``k3s/errand.py``. A Node is ready while its machine's K3s runs and
reaches a server; the API answers while a quorum of the members runs and is wired.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from k3sagentd.core.cluster import ClusterView, Errand, ErrandResult, KubeNode, Roster
from k3sagentd.core.events import ErrandEnded, FactsRead
from k3sagentd.core.k3s import Datastore, Outcome
from k3sagentd.core.words import NodeId
from tests.sim.computer import Computer
from tests.sim.dice import Fault
from tests.sim.promise import majority

if TYPE_CHECKING:
    from tests.sim.world import World


@dataclass(slots=True)
class Cluster:
    """One cluster, by the hash of its CA."""

    ca_hash: str
    members: set[str] = field(default_factory=set)
    """etcd's member list, each by what stands in its data."""
    nodes: dict[str, KubeNode] = field(default_factory=dict)
    version: int | None = None
    """The Lease's resourceVersion; None: there is no Lease."""
    holder: NodeId | None = None
    roster: Roster | None = None
    uids: int = 0

    def register(self, m: Computer, name: str, *, server: bool) -> None:
        """The kubelet registers, or finds, its Node."""
        known = self.nodes.get(name)
        if known is None:
            self.uids += 1
            known = KubeNode(
                name=name,
                uid=f"u{self.uids}",
                node=m.id if m.k3s.labelled else None,
                hardware=m.hardware if m.k3s.labelled else None,
                server=server,
                ready=True,
            )
        self.nodes[name] = replace(known, server=known.server or server)


def of(world: World, ca_hash: str) -> Cluster:
    """The cluster with this CA, made when it is first spoken of."""
    return world.clusters.setdefault(ca_hash, Cluster(ca_hash))


def running_members(world: World, ca_hash: str, seen_by: Computer) -> list[Computer]:
    """Machines whose server runs as a member and which ``seen_by`` reaches."""
    cluster = of(world, ca_hash)
    return [
        c
        for c in world.computers
        if c.k3s.ready
        and c.k3s.store is Datastore.ETCD
        and c.k3s.member in cluster.members
        and (c is seen_by or world.network.wired(c, seen_by))
    ]


def has_quorum(world: World, ca_hash: str, seen_by: Computer) -> bool:
    """Whether etcd takes writes, asked at ``seen_by``."""
    members = of(world, ca_hash).members
    return len(running_members(world, ca_hash, seen_by)) >= majority(len(members))


def is_ready(world: World, cluster: Cluster, kube: KubeNode) -> bool:
    """Whether K3s hears the machine behind a Node."""
    for c in world.computers:
        if c.k3s.cluster == cluster.ca_hash and c.k3s.ready and c.k3s.name == kube.name:
            stands = c.k3s.store is Datastore.AGENT or c.k3s.member in cluster.members
            if stands and (kube.node is None or kube.node == c.id):
                return True
    return False


def view(world: World, cluster: Cluster) -> ClusterView:
    """What one look at the API shows."""
    nodes = (replace(n, ready=is_ready(world, cluster, n)) for n in cluster.nodes.values())
    return ClusterView(
        nodes=tuple(sorted(nodes, key=lambda n: n.name)),
        lease_version=None if cluster.version is None else str(cluster.version),
        holder=cluster.holder,
        roster=cluster.roster,
    )


# --- root's errands ---------------------------------------------------------------------------


def take(world: World, m: Computer, errand: Errand) -> None:
    """An errand was written: root does it a moment later, or dies with it."""
    m.errands += 1
    if world.strikes(Fault.ORDER_LOST, m.number, -m.errands):
        return
    span_s = 0.2 + 0.8 * world.dice.uniform(6, m.number, m.errands)
    world.at(span_s, _do, world, m, m.power, m.process, errand)


def _do(world: World, m: Computer, power: int, process: int, errand: Errand) -> None:
    if m.power != power or m.k3s.cluster is None:
        return
    cluster = of(world, m.k3s.cluster)
    found: ClusterView | None = None
    if not m.k3s.ready or not has_quorum(world, cluster.ca_hash, m):
        reason: str | None = "the API does not answer"
    else:
        reason = _carry_out(world, m, cluster, errand)
        found = view(world, cluster)
    outcome = Outcome.DONE if reason is None else Outcome.FAILED
    result = ErrandResult(errand=errand, outcome=outcome, reason=reason, view=found)
    m.seen = m.facts()
    if m.process == process:
        world.tell(m, f"{errand.describe()}: {reason or 'done'}")
        world.feed(m, FactsRead(now_s=m.clock(world.now_s), facts=m.seen))
        world.feed(m, ErrandEnded(now_s=m.clock(world.now_s), result=result))


def _carry_out(world: World, m: Computer, cluster: Cluster, errand: Errand) -> str | None:
    """Do it; else why not."""
    if not errand.hold:
        return None
    seen = None if errand.lease_version is None else int(errand.lease_version)
    if seen != cluster.version:
        return "the lease was changed meanwhile"
    cluster.version = (cluster.version or 0) + 1
    cluster.holder = errand.node
    if errand.roster is not None:
        world.promise.writes_roster(m, cluster.ca_hash, cluster.roster, errand.roster)
        cluster.roster = errand.roster
    if errand.remove is not None and (reason := _remove(world, m, cluster, errand)):
        return reason
    if errand.release:
        cluster.version += 1
        cluster.holder = None
    return None


def _remove(world: World, m: Computer, cluster: Cluster, errand: Errand) -> str | None:
    kube = cluster.nodes.get(str(errand.remove))
    if kube is None:
        return None
    if kube.uid != errand.uid:
        return f"{kube.name} is another Node now"
    if errand.dead and is_ready(world, cluster, kube):
        return f"{kube.name} is ready"
    if kube.server:
        servers = [n for n in cluster.nodes.values() if n.server]
        ready = sum(is_ready(world, cluster, n) for n in servers if n.name != kube.name)
        if len(servers) < 2 or ready < majority(len(servers) - 1):
            return f"removing {kube.name} would cost the quorum"
    world.promise.removes_node(m, cluster.ca_hash, kube)
    del cluster.nodes[kube.name]
    cluster.members -= {member for member in cluster.members if member.startswith(f"{kube.name}/")}
    return None
