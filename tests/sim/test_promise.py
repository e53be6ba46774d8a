# SPDX-License-Identifier: Apache-2.0
"""The promise, situation by situation; ``test_seeds`` has the many."""

from dataclasses import replace

import pytest

from k3sagentd.core import status
from k3sagentd.core.k3s import Datastore
from k3sagentd.core.words import NodePhase
from tests.sim import happenings
from tests.sim.computer import Computer
from tests.sim.dice import Fault
from tests.sim.plan import Happening, MachinePlan, Plan, calm
from tests.sim.world import World


def site(nodes: int, *changed: tuple[int, dict[str, object]], **options: object) -> World:
    """A calm site, with some machines made otherwise."""
    plan = calm(nodes)
    machines = list(plan.machines)
    for number, changes in changed:
        machines[number] = replace(machines[number], **changes)
    return World(replace(plan, machines=tuple(machines), **options))


def until(world: World, what, limit_s: float = 100.0) -> None:
    """Go on until ``what`` holds."""
    end_s = world.now_s + limit_s
    while not what():
        assert world.now_s < end_s, "it did not happen"
        world.run(world.now_s + 0.05)


def started(world: World) -> list[Computer]:
    return [m for m in world.computers if m.node and m.node.durable.started_epoch == 0]


def line(world: World, number: int) -> str:
    m = world.computers[number]
    assert m.node is not None
    return str(status.waiting_for(m.node, m.clock(world.now_s)))


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 9, 50])
def test_a_quiet_site_starts_itself(nodes: int) -> None:
    world = site(nodes)
    world.run(100)
    assert world.complete
    assert len(world.promise.founded) == 1


def test_an_init_node_that_dies_is_replaced_and_stands_down() -> None:
    world = site(5, abandon_after_s=10.0)
    until(world, lambda: started(world))
    init = started(world)[0]
    world.run(world.now_s + 1.5)
    world.power_off(init)
    world.run(world.now_s + 60)
    assert all(m.node and m.node.seal for m in world.computers if m is not init)
    world.power_on(init)
    world.run(world.now_s + 120)
    assert world.complete
    assert len(init.k3s.aside) == 1, "its data was not moved aside"
    assert len({m.k3s.cluster for m in world.computers}) == 1


def test_an_install_that_fails_for_good_passes_the_task_on() -> None:
    world = site(5, (0, {"install_fails_for_good": True, "fsync_ms": 0.1}))
    world.run(120)
    ready = {m.number for m in world.computers if m.node and m.node.phase is NodePhase.READY}
    assert ready == {1, 2, 3, 4}
    assert "the memory cgroup is off" in line(world, 0)


def test_an_order_that_was_taken_and_lost_is_given_again() -> None:
    lost = frozenset((Fault.ORDER_LOST, (m, 1)) for m in range(3))
    world = site(3, abandon_after_s=1e6, only=lost)
    world.run(3000)
    assert not world.complete
    world.run(3 * 3700)
    assert world.complete


def test_two_halves_of_four_wait() -> None:
    world = site(4)
    world.network.partition({0, 1}, {2, 3})
    world.run(300)
    assert not world.promise.founded
    assert line(world, 0) == "2 of 4 machines here, 3 must agree"
    world.network.partition()
    world.run(400)
    assert world.complete


def test_a_minority_waits_and_the_majority_goes_on() -> None:
    world = site(5)
    world.network.partition({0, 1}, {2, 3, 4})
    world.run(60)
    assert line(world, 0) == "2 of 5 machines here, 3 must agree"
    assert len(world.promise.founded) == 1
    world.network.partition()
    world.run(200)
    assert world.complete


def test_a_node_that_sees_both_sides_does_not_make_two_clusters() -> None:
    world = site(5)
    world.network.partition({0, 1, 2}, {2, 3, 4})
    world.run(200)
    assert len(world.promise.founded) == 1
    world.network.partition()
    world.run(400)
    assert world.complete


def test_a_server_with_another_flag_is_refused_with_both_values() -> None:
    ten_one, ten_nine = ({"cluster-cidr": f"10.{n}.0.0/16"} for n in (1, 9))
    world = site(
        3,
        (0, {"shared_flags": ten_one, "fsync_ms": 1.0}),
        (1, {"shared_flags": ten_nine, "fsync_ms": 99.0}),
        (2, {"shared_flags": ten_one, "fsync_ms": 1.0}),
    )
    world.run(60)
    assert world.computers[1].node is not None
    assert world.computers[1].node.phase is NodePhase.FAILED
    assert "cluster-cidr is 10.9.0.0/16 here but 10.1.0.0/16 in the cluster" in line(world, 1)


@pytest.mark.parametrize("store", [Datastore.SQLITE, Datastore.ETCD])
def test_a_cluster_that_was_there_is_the_one(store: Datastore) -> None:
    world = site(3, (2, {"store": store, "cluster": "c" * 64, "fsync_ms": 99.0}))
    world.run(90)
    assert world.complete
    assert not world.promise.founded
    assert {m.k3s.cluster for m in world.computers} == {"c" * 64}


def test_two_clusters_under_one_token_stop_everybody() -> None:
    world = site(
        3,
        (0, {"store": Datastore.ETCD, "cluster": "a" * 64}),
        (1, {"store": Datastore.ETCD, "cluster": "b" * 64}),
        (2, {"boot_s": 5.0}),
    )
    world.run(100)
    for m in world.computers:
        assert m.node is not None
        assert m.node.phase is NodePhase.CONFLICT
    assert "CA aaaaaaaaaaaa on n0" in line(world, 2)
    assert "CA bbbbbbbbbbbb on n1" in line(world, 2)
    assert not world.promise.joined


def test_one_machine_too_many_is_told_to_all() -> None:
    extra = replace(calm(3).machines[0], boot_s=0.0)
    machines = tuple(replace(m, boot_s=0.0) for m in calm(3).machines)
    world = World(replace(calm(3), machines=(*machines, extra), delay_s=0.001))
    world.run(1)
    assert not world.promise.founded
    assert all("4 machines here but nodes is 3; " in line(world, n) for n in range(4))
    assert any("set nodes: 4 on each" in line(world, n) for n in range(4))


def test_a_disk_that_takes_nothing_is_named_while_it_does() -> None:
    world = site(3)
    world.computers[0].disk_full = True
    world.run(30)
    assert "No space left on device" in line(world, 0)
    world.computers[0].disk_full = False
    world.run(100)
    assert world.complete


# --- what the simulator found -----------------------------------------------------------------


def finishes(plan: Plan, limit_s: float) -> World:
    world = World(plan)
    happenings.schedule(world)
    world.run(plan.storm_s)
    happenings.heal(world)
    until(world, lambda: world.complete, limit_s)
    return world


def test_seed_44_one_machine_with_a_smaller_nodes_does_not_stop_the_others() -> None:
    """It learned an entry, so its log was not empty, so nobody voted any more."""
    world = site(5, (4, {"nodes": 4}))
    until(world, lambda: world.complete)


def test_seed_158_an_init_node_that_lost_its_votes_does_not_hold_the_site_up() -> None:
    """It could not seal, and as it was heard, nobody else might abandon its epoch."""
    damage = Happening(at_s=4.0, fault=Fault.DAMAGE, machine=2, amount=3)
    plan = calm(4, abandon_after_s=15.0, storm_s=5.0, happenings=(damage,))
    plan = replace(
        plan,
        machines=tuple(
            replace(m, fsync_ms=1.0 + (n != 2) * 80) for n, m in enumerate(plan.machines)
        ),
    )
    world = finishes(plan, 200)
    assert world.computers[2].k3s.aside, "its data was not moved aside"


def test_seed_286_a_joiner_asks_again_whatever_the_clock_rounds_to() -> None:
    """A deadline that was due by one sum and not by the other: no Tick came any more."""
    for seed in range(10):
        finishes(calm(9, seed, rates={Fault.LOSS: 0.4}, storm_s=30.0), 200)


def test_seed_433_a_site_with_one_able_machine_does_not_burn_its_log() -> None:
    """The two that had failed were ranked by lot, so the hopeless one was nominated for ever."""
    hopeless = MachinePlan(nodes=3, install_fails_for_good=True, fsync_ms=0.1)
    machines = (MachinePlan(nodes=3), hopeless, hopeless)
    lost = frozenset({(Fault.ORDER_LOST, (0, 1))})
    world = World(Plan(seed=1, machines=machines, abandon_after_s=15.0, only=lost))
    world.run(3600)
    assert world.computers[0].node.seal is not None
    assert len(world.computers[0].node.log) < 30
    assert all(len(v.servers) == 3 for v in world.computers[0].node.log[::2]), "one was left out"


def test_seed_56_a_cluster_that_was_there_is_never_moved_aside() -> None:
    """Its epoch was abandoned, and standing down then failed for ever."""
    there = {"store": Datastore.SQLITE, "cluster": "5" * 64, "k3s_start_s": 60.0}
    world = site(3, (0, there), abandon_after_s=15.0)
    world.run(60)
    assert len(world.computers[0].node.log) >= 2, "the epoch was not abandoned"
    world.computers[0].plan = replace(world.computers[0].plan, k3s_start_s=1.0)
    until(world, lambda: world.complete, 3600)
    assert {m.k3s.cluster for m in world.computers} == {"5" * 64}


def test_seed_355_who_cannot_vote_is_named() -> None:
    damage = tuple(Happening(at_s=1.9, fault=Fault.DAMAGE, machine=n, amount=3) for n in (0, 1))
    world = World(calm(3, storm_s=5.0, happenings=damage))
    happenings.schedule(world)
    world.run(100)
    assert "1 of 3 machines here may vote, 2 must agree; not " in line(world, 2)


@pytest.mark.parametrize("store", [Datastore.ETCD, Datastore.SQLITE])
def test_an_adopted_server_that_was_replaced_founds_nothing_when_it_is_back(
    store: Datastore,
) -> None:
    """Its operator's ``cluster-init`` would make a second cluster under the same CA."""
    world = site(4, (0, {"store": store, "cluster": "e" * 64}), replace_after_s=60.0, settle_s=30.0)
    adopted, *others = world.computers
    until(world, lambda: world.complete)
    world.run(world.now_s + 60)
    members = world.clusters["e" * 64].members
    assert len(members) == 3
    assert adopted.k3s.member in members
    world.power_off(adopted)
    world.run(world.now_s + 300)
    replaced = set(members)
    assert len(replaced) == 3
    assert adopted.k3s.member not in replaced
    world.power_on(adopted)
    world.run(world.now_s + 900)
    assert not adopted.k3s.running
    assert "etcd removed this server from its cluster" in line(world, 0)
    # And nobody waits for it, or makes room for it.
    assert members == replaced
    assert all(m.node and m.node.phase is NodePhase.READY for m in others)
    assert not world.promise.founded
