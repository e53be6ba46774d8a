# SPDX-License-Identifier: Apache-2.0
"""Carries out what a plan says happens, and what ends it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from k3sagentd.core.events import AddressChanged, PeerRefused
from k3sagentd.core.words import NodeId
from tests.sim import root
from tests.sim.computer import Computer, K3s
from tests.sim.dice import Fault
from tests.sim.disk import Disk
from tests.sim.plan import Happening

if TYPE_CHECKING:
    from tests.sim.world import World


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
