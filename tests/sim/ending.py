# SPDX-License-Identifier: Apache-2.0
"""The end of a run: who must be ready by now, and is what the others say true?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from k3sagentd.core import status
from k3sagentd.core.drive import FOR_GOOD_RETRY_S, ORDER_TIMEOUT_S
from k3sagentd.core.k3s import Datastore
from k3sagentd.core.log import Nominate, Seal
from k3sagentd.core.words import NodePhase, Role
from tests.sim import root
from tests.sim.computer import Computer
from tests.sim.dice import Fault
from tests.sim.promise import BrokenError, majority

if TYPE_CHECKING:
    from tests.sim.world import World


NOBODY_CAN = "no machine can start a cluster"
OWNER_CANNOT = "the machine with the cluster cannot lead"


def patience_s(world: World) -> float:
    """How long a healed site may take: three epochs, and what was lost on the way."""
    plan = world.plan
    longest_s = max(m.k3s_start_s for m in plan.machines)
    machines_s = 60.0 * len(plan.machines)
    lost_s = 2 * ORDER_TIMEOUT_S if plan.rates.get(Fault.ORDER_LOST) else 0.0
    lost_s += 4 * plan.replace_after_s
    return 3 * plan.abandon_after_s + 4 * longest_s + machines_s + 3 * FOR_GOOD_RETRY_S + lost_s


def judge(world: World) -> None:
    """Raise where a machine is not ready that must be, or says what is not true."""
    _clones_are_muted(world)
    if world.promise.outside is not None:
        return
    spread_s = max(m.boot_s for m in world.plan.machines)
    if not (world.happened or world.dice.struck) and world.plan.settle_s > spread_s:
        _has_its_servers(world)
    running = [m for m in world.computers if m.node is not None]
    excuse = site_excuse(world, running)
    if missing := servers_missing(world):
        raise BrokenError("a healed site has its servers", missing)
    for m in running:
        assert m.node is not None
        if m.node.phase is NodePhase.READY:
            continue
        line = status.waiting_for(m.node, m.clock(world.now_s)) or "nothing"
        if excuse is None and (own := machine_excuse(world, m)) is None:
            raise BrokenError("a healed site finishes", f"{m.name} is {m.node.phase}: {line}")
        if not told_truly(world, m, line):
            why = excuse or own
            raise BrokenError("the line is true", f"{m.name} says «{line}»; in truth: {why}")


def _has_its_servers(world: World) -> None:
    """On a good day nobody who could be a founding server is left out: it is for good."""
    nomination = world.promise.chosen.get(0)
    able_here = min(world.plan.machines[0].servers, len(world.plan.machines))
    wanted = able_here if able_here % 2 else able_here - 1
    found = len(nomination.servers) if isinstance(nomination, Nominate) else 0
    if found != wanted:
        raise BrokenError("a quiet site has its servers", f"{found} of {wanted}")


def _clones_are_muted(world: World) -> None:
    """Two live machines of one identity have found out."""
    for a, b in itertools.combinations(world.computers, 2):
        if a.id == b.id and a.node and b.node and world.network.linked(a, b):
            muted = a.node.durable.muted and b.node.durable.muted
            if not muted:
                raise BrokenError("clones stop voting", f"{a.name} and {b.name} are {a.id}")


# --- who need not be ready --------------------------------------------------------------------


def sealed_to(world: World) -> Seal | None:
    """The seal, as any disk has it, of the newest start."""
    known = [m.node for m in world.computers if m.node is not None and m.node.log]
    newest = max((node.generation for node in known), default=None)
    seals = [node.seal for node in known if node.generation == newest and node.seal is not None]
    return seals[0] if seals else None


def servers_missing(world: World) -> str | None:
    """What is not yet as it should be of a sealed site's servers; None where all is well.

    Dead members are replaced and removed wherever enough machines can serve.
    """
    seal = sealed_to(world)
    running = [m for m in world.computers if m.node is not None]
    if seal is None or site_excuse(world, running) is not None:
        return None
    fit = [
        m
        for m in running
        if m.plan.role is not Role.AGENT
        and not m.plan.install_fails_for_good
        and m.plan.shared_flags == seal.shared_flags
        and m.k3s.cluster == seal.ca_hash
        and (m.k3s.labelled or not m.k3s.tombstone)
        and [c.id for c in world.computers].count(m.id) == 1
    ]
    servers = max(m.plan.servers for m in running)
    if len(fit) < servers:
        return None
    ids = [c.id for c in world.computers]
    if len(set(ids)) < len(ids):
        return None  # of two with one identity a person must reset one, whichever lives
    members = world.clusters[seal.ca_hash].members
    alive = [m for m in running if m.k3s.member in members]
    if any(machine_excuse(world, m) is not None for m in alive):
        return None  # a person must look at a member before it can go, or stay
    if len(alive) < len(members):
        return f"{len(members) - len(alive)} dead of {len(members)} members"
    if len(members) < servers or len(members) % 2 == 0:
        return f"{len(members)} members, {servers} wanted of {len(fit)} fit machines"
    return None


def able(world: World, m: Computer) -> bool:
    """Whether this machine can start a cluster in the time that it is given."""
    in_time = m.plan.k3s_start_s * 1.5 + 5.0 < world.plan.abandon_after_s
    return m.plan.role is not Role.AGENT and not m.plan.install_fails_for_good and in_time


def site_excuse(world: World, running: list[Computer]) -> str | None:
    """Why the site as a whole need not be complete; None when it must."""
    seal = sealed_to(world)
    if seal is not None:
        alive = [m for m in running if m.k3s.cluster == seal.ca_hash]
        if not any(m.k3s.store is Datastore.ETCD for m in alive):
            return "no server of the sealed cluster is left"
        members = world.clusters[seal.ca_hash].members
        if sum(m.k3s.member in members for m in alive) < majority(len(members)):
            return "etcd has lost its quorum"
        return None
    clusters = {m.k3s.cluster for m in running if m.k3s.cluster and m.k3s.was_there}
    if len(clusters) > 1:
        return "two clusters"
    if any(_is_missed(m, c) for c in world.computers for m in running):
        return "a cluster that was heard of is off"
    nodes = max((m.node.nodes for m in running if m.node), default=0)
    others = [m for m in running if m.node and m.node.nodes != nodes]
    if any(m.node and m.node.durable.nodes is not None for m in others):
        return "nodes differ, and votes were cast"
    if len({m.plan.servers for m in running}) > 1:
        return "servers differ"
    if len({m.id for m in running}) > nodes and not any(m.node and m.node.log for m in running):
        return "more machines than nodes"
    voters = [m for m in running if m.node and m.node.durable.muted is None and m not in others]
    if len(voters) < majority(nodes):
        return f"{len(voters)} voters of {nodes}"
    if not any(able(world, m) for m in voters):
        return NOBODY_CAN
    owners = [m for m in running if m.k3s.cluster in clusters]
    if owners and not any(able(world, m) and m in voters for m in owners):
        return OWNER_CANNOT
    if owners and len([m for m in voters if m not in owners]) < majority(nodes):
        # Its vote is needed, and it gives none to a nomination that others accepted before.
        return OWNER_CANNOT
    return None


def _is_missed(m: Computer, c: Computer) -> bool:
    """Whether ``m`` heard of a cluster from before that is on ``c`` alone, which is off."""
    known = c.node is None and c.k3s.was_there and m.node is not None and c.id in m.node.peers
    return known and c.k3s.cluster is not None


def machine_excuse(world: World, m: Computer) -> str | None:
    """Why this machine need not be ready though the site is sealed or must be."""
    assert m.node is not None
    seal, nomination = sealed_to(world), m.node.nomination
    if m.plan.install_fails_for_good:
        return "its install fails for good"
    if any(c is not m and c.id == m.id for c in world.computers):
        return "another machine has its identity"
    if seal is None:
        return None
    if m.plan.shared_flags and seal.shared_flags != m.plan.shared_flags:
        return "a flag that all servers share is another here"
    if m.k3s.tombstone and not m.k3s.labelled:
        return "etcd removed it, and its K3s is not ours"
    if m.k3s.cluster not in (None, seal.ca_hash):
        return "it has data of another cluster"
    listed = m.id in m.node.roster.servers and m.k3s.store is not Datastore.ETCD
    if not isinstance(nomination, Nominate) or (m.k3s.cluster == seal.ca_hash and not listed):
        return None
    alive = {other.id: other for other in world.computers if other.node is not None}
    for founder in m.node.roster.servers if listed else nomination.servers:
        plan = alive[founder].plan if founder in alive else None
        if plan is None or plan.install_fails_for_good or plan.shared_flags != seal.shared_flags:
            return f"the founding server {founder} cannot be prepared"
    return None


# --- whether a line is true -------------------------------------------------------------------


def told_truly(world: World, m: Computer, line: str) -> bool:
    """Whether a line names a reason that the world bears out."""
    return any(
        (found := re.search(pattern, line)) is not None and holds(world, m, found)
        for pattern, holds in LINES
    )


def _counts(world: World, m: Computer, found: re.Match[str]) -> bool:
    here = sum(1 for c in world.computers if c is m or world.network.linked(c, m))
    ids = len({c.id for c in world.computers if c is m or world.network.linked(c, m)})
    return int(found[1]) in (here, ids) and int(found[1]) < int(found[3])


def _too_few_voters(world: World, m: Computer, found: re.Match[str]) -> bool:
    voters = {
        c.id
        for c in world.computers
        if c.node and m.node and c.node.durable.muted is None and c.node.nodes == m.node.nodes
    }
    return len(voters) == int(found[1]) < int(found[3])


def _differ(world: World, m: Computer, found: re.Match[str]) -> bool:
    set_to = {"nodes": set[int](), "servers": {c.plan.servers for c in world.computers if c.node}}
    set_to["nodes"] = {c.node.nodes for c in world.computers if c.node}
    return {int(found[2]), int(found[3])} <= set_to[found[1]] and found[2] != found[3]


def _crowd(world: World, m: Computer, found: re.Match[str]) -> bool:
    return int(found[1]) > int(found[2])


def _muted(world: World, m: Computer, found: re.Match[str]) -> bool:
    return any(c.disk.outcomes[-1] and c.disk.outcomes[-1].muted for c in world.computers)


def _clusters(world: World, m: Computer, found: re.Match[str]) -> bool:
    # Who was told to join a cluster may have its data, even where it was kept out so far.
    known = {c.k3s.cluster or c.k3s.joining for c in world.computers if c.node} - {None}
    seal = sealed_to(world)
    return len(known | ({seal.ca_hash} if seal else set())) > 1


def _was_told(world: World, m: Computer, found: re.Match[str]) -> bool:
    left = m.disk.outcomes[-1]
    return left is not None and left.started_epoch is not None


def _owner(world: World, m: Computer, found: re.Match[str]) -> bool:
    return any(c.k3s.cluster and c.k3s.was_there for c in world.computers if c.node)


def _is_off(world: World, m: Computer, found: re.Match[str]) -> bool:
    return any(_is_missed(m, c) and c.name == found[1] for c in world.computers)


def _hopeless(world: World, m: Computer, found: re.Match[str]) -> bool:
    return m.plan.install_fails_for_good or m.k3s.store is not Datastore.NONE


def _unprepared(world: World, m: Computer, found: re.Match[str]) -> bool:
    lost = site_excuse(world, [c for c in world.computers if c.node]) is not None
    return lost or str(machine_excuse(world, m)).startswith("the founding server")


def _unable_init(world: World, m: Computer, found: re.Match[str]) -> bool:
    return not any(able(world, c) for c in world.computers if c.node)


def _starting(world: World, m: Computer, found: re.Match[str]) -> bool:
    return not root.probe(world, m).ready


def _removed(world: World, m: Computer, found: re.Match[str]) -> bool:
    return m.k3s.tombstone and not m.k3s.labelled


def _is_whole_site(world: World, m: Computer, found: re.Match[str]) -> bool:
    return m.node is not None and m.node.nodes == 1


def _looks(world: World, m: Computer, found: re.Match[str]) -> bool:
    # As it said when it was asked last; it is asked again in a moment.
    return any(c.name == found[1] and c.k3s.ready for c in world.computers)


def _flags(world: World, m: Computer, found: re.Match[str]) -> bool:
    return bool(m.plan.shared_flags)


def _applying(world: World, m: Computer, found: re.Match[str]) -> bool:
    # Also where apply died with the order: nobody told the daemon.
    return m.node is not None and m.node.drive.result is None


def _trying(world: World, m: Computer, found: re.Match[str]) -> bool:
    running = [c for c in world.computers if c.node]
    return site_excuse(world, running) in (NOBODY_CAN, OWNER_CANNOT)


def _still_heard(world: World, m: Computer, found: re.Match[str]) -> bool:
    return any(c.k3s.ready and c.k3s.name == found[1] for c in world.computers)


def _lost_cluster(world: World, m: Computer, found: re.Match[str]) -> bool:
    return site_excuse(world, [c for c in world.computers if c.node]) is not None


LINES: tuple[tuple[str, Callable[[World, Computer, re.Match[str]], bool]], ...] = (
    (r"(\d+) of (\d+) machines here, (\d+) must agree", _counts),
    (r"(\d+) of (\d+) machines here may vote, (\d+) must agree", _too_few_voters),
    (r"(nodes|servers) is (\d+) here but (\d+) on", _differ),
    (r"(\d+) machines here but nodes is (\d+);", _crowd),
    (r"its votes are lost|another live machine has this node's identity", _muted),
    (r"^(\S+), which has K3s data of a cluster, to be on again", _is_off),
    (r"has K3s data of a cluster", _owner),
    (r"two clusters under one token|and the site's is another", _clusters),
    (r"(\S+) was forced to start a new cluster, and this machine has data", _clusters),
    (r"(\S+) was forced to start a new cluster, and this machine was to", _was_told),
    (r"the memory cgroup is off|single-node cluster of its own|the data of", _hopeless),
    (r"etcd removed this server from its cluster", _removed),
    (r"^(.+) to be prepared \(servers join when all are\)", _unprepared),
    (r"no server can be reached|to hand out the registration address", _lost_cluster),
    (r"the Node (\S+) to be given up by K3s, which still hears it", _still_heard),
    (r"the cluster's only server|^any of the servers", _lost_cluster),
    (r"a machine that may be a server: all here", _unable_init),
    (r"^nobody to be heard: looks for a cluster", _is_whole_site),
    (r"^(\S+): the list of the cluster's Nodes to be read", _looks),
    (r"^K3s on this machine to be ready", _starting),
    (r"cluster-cidr is 10.99.0.0/16 here but (\S+|not set) in the cluster", _flags),
    (r"k3sagentd-apply to take the order", _applying),
    (r"^(\S+) to start the cluster|^another attempt of|ranks first, to be nominated", _trying),
    (r"^init: |^stand-down: ", _trying),
)
"""What a line may say at the end of a run, and when that is true."""
