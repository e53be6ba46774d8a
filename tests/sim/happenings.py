# SPDX-License-Identifier: Apache-2.0
"""Carries out what a plan says happens, and what ends it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from k3sagentd.core.events import AddressChanged, InitForced, PeerRefused
from k3sagentd.core.k3s import Datastore
from k3sagentd.core.words import NodeId, Role
from tests.sim import cluster, root
from tests.sim.computer import Computer, K3s
from tests.sim.dice import Fault
from tests.sim.disk import Disk
from tests.sim.plan import Happening
from tests.sim.promise import majority

if TYPE_CHECKING:
    from tests.sim.world import World


BROUGHT_S = 3.0
"""From the power-on of a machine that was brought to the operator's word at it."""


def schedule(world: World) -> None:
    """Put all that a plan says into the world's queue."""
    for number, happening in enumerate(world.plan.happenings, 1):
        world.at(happening.at_s, strike, world, happening, number)
    world.happened.update(world.plan.traits)


def strike(world: World, what: Happening, number: int) -> None:
    """One happening; counted where it changed anything."""
    if not world.stormy or what.machine >= len(world.computers):
        return
    m = world.computers[what.machine]
    world.tell(m, what.describe())
    if _strike(world, m, what, number):
        world.happened[what.fault] += 1


def _strike(world: World, m: Computer, what: Happening, number: int) -> bool:
    match what.fault:
        case Fault.PARTITION | Fault.ONE_WAY | Fault.BRIDGE:
            return _cut(world, what, number)
        case Fault.CLOCK_JUMP:
            # Linux refuses times before 1970 (settimeofday(2)).
            m.wall_s = max(m.wall_s + what.amount, -world.now_s)
            world.network.relink(m)
            return True
        case Fault.RECONFIGURED:
            m.plan = replace(m.plan, nodes=max(1, what.amount))
            world.stop_daemon(m)
            world.at(1.0, world.start_daemon, m)
            return True
        case Fault.LATE:
            return _late(world, what)
        case Fault.FORCED:
            return _forced(world, what, number)
        case Fault.CLONE:
            clone = world.copy(m)
            world.power_on(clone)
            return True
    return m.on and _strike_running(world, m, what)


def _strike_running(world: World, m: Computer, what: Happening) -> bool:
    match what.fault:
        case Fault.POWER_CUT:
            world.power_off(m)
            world.at(1 + what.for_s, world.power_on, m)
        case Fault.GONE:
            m.gone = True
            world.power_off(m)
        case Fault.SERVER_GONE:
            return _server_gone(world, m)
        case Fault.ROLE:
            return _role(world, m, what)
        case Fault.DAEMON_KILLED:
            world.stop_daemon(m)
            world.at(min(what.for_s, 10.0), world.start_daemon, m)
        case Fault.PAUSE:
            world.pause_daemon(m)
            world.at(what.for_s, world.resume_daemon, m)
            return m.paused
        case Fault.DAMAGE:
            world.power_off(m)
            m.disk.damage = what.amount
            world.at(2.0, world.power_on, m)
        case Fault.DISK_FULL:
            m.disk_full = True
            world.at(what.for_s, _disk_mended, m)
        case Fault.ADDRESS:
            _address(world, m, what)
        case Fault.STRANGER:
            reason = "the certificate is of another site"
            now_s = m.clock(world.now_s)
            world.feed(m, PeerRefused(now_s=now_s, address="10.9.9.9", reason=reason))
        case Fault.FLAGS:
            m.plan = replace(m.plan, shared_flags={"cluster-cidr": "10.99.0.0/16"})
            world.stop_daemon(m)
            root.dies(world, m)
            world.at(1.0, world.start_daemon, m)
        case Fault.K3S_DIES:
            if not m.k3s.running:
                return False
            root.dies(world, m)
        case Fault.REIMAGE_EARLY | Fault.REIMAGE_LATE:
            return _reimage(world, m, what)
        case _:
            raise AssertionError(what)
    return True


# --- after the seal ---------------------------------------------------------------------------


def _is_sealed(world: World) -> bool:
    return any(m.node is not None and m.node.seal is not None for m in world.computers)


def _late(world: World, what: Happening) -> bool:
    """Machines are added to a site that is there."""
    if not _is_sealed(world):
        return False
    first = world.plan.machines[0]
    plan = replace(first, store=Datastore.NONE, cluster=None, origin=None, role=Role.AUTO)
    for _ in range(what.amount):
        world.power_on(world.add(plan))
    return True


def _server_gone(world: World, m: Computer) -> bool:
    """A server that the others can do without."""
    ca_hash = m.k3s.cluster
    if m.k3s.store is not Datastore.ETCD or ca_hash is None or not _is_sealed(world):
        return False
    members = cluster.of(world, ca_hash).members
    left = [c for c in world.computers if c is not m and c.k3s.member in members and not c.gone]
    if m.k3s.member in members and len(left) < majority(len(members)):
        return False
    m.gone = True
    world.power_off(m)
    return True


def _role(world: World, m: Computer, what: Happening) -> bool:
    """The operator says what this machine shall be, and starts the daemon again."""
    if m.node is None or m.node.seal is None:
        return False
    m.plan = replace(m.plan, role=(Role.SERVER, Role.AGENT, Role.AUTO)[what.amount % 3])
    world.stop_daemon(m)
    world.at(1.0, world.start_daemon, m)
    return True


def _forced(world: World, what: Happening, number: int) -> bool:
    """Every machine with a server's data is gone, and one with none is made to start anew.

    Where all have data of the cluster, a new machine is brought for it.
    """
    if not _is_sealed(world) or any(m.node and m.node.generation.number for m in world.computers):
        return False
    holders = [m for m in world.computers if m.k3s.store in (Datastore.ETCD, Datastore.SQLITE)]
    free = [m for m in world.computers if m.on and m.k3s.store is Datastore.NONE and m.node]
    able = [m for m in free if m.plan.role is not Role.AGENT and not m.plan.install_fails_for_good]
    if holders and not able and not what.amount:
        _late(world, replace(what, amount=1))
        world.at(BROUGHT_S, strike, world, replace(what, amount=1), number)
    if not holders or not able:
        return False
    for m in holders:
        m.gone = True
        world.power_off(m)
    world.promise.forced()
    for m in able:
        if m.node is None:
            continue
        world.feed(m, InitForced(now_s=m.clock(world.now_s)))
        if m.node is not None and m.node.is_forced:
            return True
    return False


def _disk_mended(m: Computer) -> None:
    m.disk_full = False


def _cut(world: World, what: Happening, number: int) -> bool:
    numbers = range(len(world.computers))
    side = set(what.others)
    pairs = {
        (a, b) for a, b in itertools.product(numbers, numbers) if (a in side) and (b not in side)
    }
    if what.fault is not Fault.ONE_WAY:
        pairs |= {(b, a) for a, b in pairs}
    if what.fault is Fault.BRIDGE:
        pairs = {pair for pair in pairs if what.machine not in pair}
    if not pairs:
        return False
    world.network.cuts[number] = frozenset(pairs)
    world.network.relink_all()
    world.at(1 + what.for_s, _mend, world, number)
    return True


def _mend(world: World, number: int) -> None:
    if world.network.cuts.pop(number, None) is not None:
        world.network.relink_all()


def _address(world: World, m: Computer, what: Happening) -> None:
    m.address = None
    world.feed(m, AddressChanged(now_s=m.clock(world.now_s), address=None))
    world.at(min(what.for_s, 30.0), _new_address, world, m, f"10.1.{m.number}.{m.effects % 250}")


def _new_address(world: World, m: Computer, address: str) -> None:
    m.address = address
    world.feed(m, AddressChanged(now_s=m.clock(world.now_s), address=address))


def _reimage(world: World, m: Computer, what: Happening) -> bool:
    """A person writes a new card: identity, votes and K3s's data are gone."""
    sealed = m.node is not None and m.node.seal is not None
    if sealed is not (what.fault is Fault.REIMAGE_LATE):
        return False
    world.power_off(m)
    if m.k3s.cluster is not None:
        world.promise.taken = (*world.promise.taken, (m.number, m.k3s.cluster))
    world.promise.taken += tuple((m.number, cluster) for cluster in m.k3s.aside)
    m.id = NodeId(f"n{m.number}r{m.power}")
    m.disk, m.k3s = Disk(m.id), K3s()
    world.at(2.0, world.power_on, m)
    return True


def heal(world: World) -> None:
    """The storm is over: the wire is whole, disks take writes, whoever may be on is on."""
    world.stormy = False
    world.network.cuts.clear()
    for m in world.computers:
        m.disk_full = False
        world.resume_daemon(m)
        if m.address is None:
            _new_address(world, m, f"10.2.{m.number}.1")
        world.power_on(m)
        world.start_daemon(m)
    world.network.relink_all()
