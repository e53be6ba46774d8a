# SPDX-License-Identifier: Apache-2.0
"""The promise, over many seeds: never two clusters, and a healed site finishes."""

import pytest

from k3sagentd.core import status
from k3sagentd.core.k3s import Datastore, Facts
from k3sagentd.core.words import NodePhase
from tests.sim.world import World, node_id


def power_all(world: World, spread_s: float = 2.0) -> None:
    for m in world.machines.values():
        world.at(world.random.uniform(0, spread_s), lambda m=m: world.power_on(m))


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 9])
def test_a_quiet_site_starts_itself(nodes: int) -> None:
    world = World(1, nodes)
    power_all(world)
    world.run(60)
    assert world.complete, world.told()
    assert len(world.founded) == 1


@pytest.mark.parametrize("seed", range(40))
def test_loss_crashes_and_partitions(seed: int) -> None:
    world = World(seed, 5, loss=0.2, crash=0.01, delay_s=0.1, abandon_after_s=20.0)
    power_all(world, 10)
    everybody = list(range(5))
    for i in range(8):
        world.random.shuffle(everybody)
        cut = world.random.randint(1, 4)
        left, right = set(everybody[:cut]), set(everybody[cut:])
        world.at(5 + 15 * i, lambda a=left, b=right: world.partition(a, b))
        world.at(13 + 15 * i, lambda: world.partition(set(range(5))))
    world.run(140)
    world.loss = world.crash = 0.0
    for m in world.machines.values():
        world.power_on(m)
    world.partition(set(range(5)))
    world.run(1500)
    assert world.complete, world.told()


@pytest.mark.parametrize("seed", range(10))
def test_an_init_node_that_dies_is_replaced_and_stands_down(seed: int) -> None:
    world = World(seed, 5, abandon_after_s=10.0)
    power_all(world)
    while not (started := [m for m in world.machines.values() if m.durable.started_epoch == 0]):
        world.run(world.now_s + 0.05)
    world.power_off(started[0])
    world.run(world.now_s + 60)
    others = [m for m in world.machines.values() if m is not started[0]]
    assert all(m.node and m.node.seal for m in others), world.told()
    world.power_on(started[0])
    world.run(world.now_s + 120)
    assert world.complete, world.told()
    assert len({m.k3s_of for m in world.machines.values()}) == 1


def test_an_install_that_fails_for_good_passes_the_task_on() -> None:
    world = World(3, 3)
    power_all(world)
    while not (started := [m for m in world.machines.values() if m.durable.started_epoch == 0]):
        for m in world.machines.values():
            m.install_fails = bool(m.node and m.node.is_init)
        world.run(world.now_s + 0.02)
    started[0].install_fails = True
    world.run(world.now_s + 120)
    assert world.complete, world.told()
    assert len(world.founded) == 1


def test_an_order_that_was_taken_and_lost_is_given_again() -> None:
    world = World(3, 3, abandon_after_s=1e6)
    for m in world.machines.values():
        m.swallows = 1
    power_all(world)
    world.run(3000)
    assert not world.complete
    world.run(3 * 3700)
    assert world.complete, world.told()


def test_two_halves_of_four_wait() -> None:
    world = World(4, 4)
    world.partition({0, 1}, {2, 3})
    power_all(world)
    world.run(300)
    assert not world.founded, world.told()
    assert all(not m.durable.log for m in world.machines.values())
    world.partition({0, 1, 2, 3})
    world.run(400)
    assert world.complete, world.told()


def test_a_minority_waits_and_the_majority_goes_on() -> None:
    world = World(5, 5)
    world.partition({0, 1}, {2, 3, 4})
    power_all(world)
    world.run(60)
    assert not world.machines[node_id(0)].durable.log
    assert len(world.founded) == 1, world.told()
    world.partition(set(range(5)))
    world.run(200)
    assert world.complete, world.told()


def test_a_smaller_idea_of_the_site_never_elects_beside_a_larger_one() -> None:
    world = World(6, 3)
    for number in (3, 4, 5):
        world.add(number, 5)
    world.power_on(world.machines[node_id(3)])
    world.run(1)
    power_all(world)
    world.run(200)
    small = [world.machines[node_id(n)] for n in range(3)]
    assert len(world.founded) <= 1, world.told()
    assert all(m.durable.nodes is None for m in small), f"one of them voted\n{world.told()}"


def test_a_server_with_another_flag_is_refused_with_both_values() -> None:
    world = World(7, 3)
    odd = world.machines[node_id(1)]
    odd.facts = Facts(fsync_ms=99.0, shared_flags={"cluster-cidr": "10.9.0.0/16"})
    for m in world.machines.values():
        if m is not odd:
            m.facts = Facts(fsync_ms=1.0, shared_flags={"cluster-cidr": "10.1.0.0/16"})
    power_all(world)
    world.run(60)
    assert odd.node is not None
    assert odd.node.phase is NodePhase.FAILED, world.told()
    line = str(status.waiting_for(odd.node, world.now_s))
    assert "cluster-cidr is 10.9.0.0/16 here but 10.1.0.0/16 in the cluster" in line


@pytest.mark.parametrize("store", [Datastore.SQLITE, Datastore.ETCD])
def test_a_cluster_that_was_there_is_the_one(store: Datastore) -> None:
    world = World(8, 3)
    owner = world.machines[node_id(2)]
    owner.k3s_of = "c" * 64
    owner.facts = Facts(datastore=store, ca_hash=owner.k3s_of, fsync_ms=99.0)
    power_all(world)
    world.run(90)
    assert world.complete, world.told()
    assert not world.founded
    assert {m.k3s_of for m in world.machines.values()} == {"c" * 64}


def test_two_clusters_under_one_token_stop_everybody() -> None:
    world = World(9, 3)
    for number, ca in ((0, "a" * 64), (1, "b" * 64)):
        m = world.machines[node_id(number)]
        m.k3s_of, m.facts = ca, Facts(datastore=Datastore.ETCD, ca_hash=ca, fsync_ms=1.0)
        world.power_on(m)
    world.run(1)
    world.power_on(world.machines[node_id(2)])
    world.run(100)
    for m in world.machines.values():
        assert m.node is not None
        assert m.node.phase is NodePhase.CONFLICT, world.told()
    line = str(status.waiting_for(world.machines[node_id(2)].node, world.now_s))
    assert "CA aaaaaaaaaaaa on n0" in line
    assert "CA bbbbbbbbbbbb on n1" in line
    assert not world.joined


def test_one_machine_too_many_is_told_to_all() -> None:
    world = World(10, 3)
    world.add(3, 3)
    for m in world.machines.values():
        world.power_on(m)
    world.delay_s = 0.001
    world.run(1)
    lines = {str(status.waiting_for(m.node, 1.0)) for m in world.machines.values()}
    assert not world.founded
    assert all("4 machines here but nodes is 3; " in line for line in lines), lines
    assert any("set nodes: 4 on each" in line for line in lines), lines
