# SPDX-License-Identifier: Apache-2.0
"""Where this machine stands towards the site: what its disk, its orders and its log say."""

from __future__ import annotations

from k3sagentd.core import guards, log
from k3sagentd.core.hello import fixed_urls, has_moved, k3s_role, may_be_started, own_url
from k3sagentd.core.k3s import (
    Action,
    Datastore,
    Outcome,
    ServerOrAgent,
)
from k3sagentd.core.log import Seal
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId

STARTS_LIMIT = 5
"""A machine that goes off so often before its K3s is ready is not one to start a cluster with."""


def started_epoch(node: Node) -> int | None:
    """The epoch in which we were to start the cluster: as we know it, or as its data says.

    An identity that lost its state may still have the data; another identity's is none of ours.
    """
    if node.durable.started_epoch is not None or not is_own(node):
        return node.durable.started_epoch
    return node.facts.origin if node.facts is not None else None


def started_generation(node: Node) -> int:
    """The generation of that epoch."""
    if node.durable.started_epoch is not None or node.facts is None or not is_own(node):
        return node.durable.started_generation
    return node.facts.origin_generation


def is_own(node: Node) -> bool:
    """Whether this very identity was told to start what is on the disk."""
    return node.facts is not None and node.facts.origin_node == node.id


def has_own_start(node: Node) -> bool:
    """Whether this machine's data is what it was told to start, and nothing else."""
    durable, facts = node.durable, node.facts
    if durable.started_epoch is None or facts is None or not is_own(node):
        return False
    made = (facts.origin_generation, facts.origin)
    return made == (durable.started_generation, durable.started_epoch)


def is_own_start(node: Node) -> bool:
    """Whether it is that, also where the state that would say so is lost."""
    lost = node.durable.started_epoch is None and is_own(node)
    return has_own_start(node) or (lost and started_epoch(node) is not None)


def must_stand_down(node: Node) -> bool:
    """Whether the epoch in which we were to start the cluster was abandoned."""
    started = started_epoch(node)
    if started is None or started_generation(node) != node.generation.number:
        return False
    return log.is_abandoned(node.log, started)


def is_other_role(node: Node) -> bool:
    """Whether K3s here was made for the other role than the roster gives this machine now.

    By what it was last told, also where nobody said that it was done; facts are of before K3s had
    begun.
    """
    role, facts, order = k3s_role(node), node.facts, node.drive.order
    if role is None or facts is None or node.seal is None or facts.removed:
        return False  # what etcd has removed is a server no more, and not ours to change
    if order is not None and may_be_started(node):
        return order.role is not role
    if role is ServerOrAgent.SERVER:
        # What runs and has no CA to show is an agent.
        runs_as_agent = node.k3s.ready and node.k3s.ca_hash is None
        return facts.datastore is Datastore.AGENT or runs_as_agent
    return facts.datastore in (Datastore.ETCD, Datastore.SQLITE)


def moved(node: Node) -> str | None:
    """This server's address is not the one that etcd knows it by (K3S.md 8)."""
    if node.facts is None or not has_moved(node):
        return None
    return (
        f"etcd knows this server at {node.facts.node_ip}, its address is {node.address} now; give "
        "it back, or run k3sagentd repair-addresses here"
    )


def unfinished(node: Node) -> str | None:
    """A command of the operator is half done on this machine: no order is obeyed until it ends."""
    command = node.facts.unfinished if node.facts is not None else None
    again = "has not ended here; where it runs no more, run it again"
    return None if command is None else f"k3sagentd {command} {again}"


def init_failure(node: Node, now_s: float) -> str | None:
    """Why this init node will not make the cluster; None while there is hope."""
    drive = node.drive
    if elsewhere := guards.cluster_elsewhere(node):
        return elsewhere
    if node.k3s.ready or drive.order is None or drive.order.action is not Action.INIT:
        return None
    reason = drive.result.reason if drive.result else None
    if node.durable.starts > STARTS_LIMIT:
        return f"K3s was started here {STARTS_LIMIT} times, and the machine went off each time"
    if drive.outcome is Outcome.FAILED_FOR_GOOD:
        return reason or "the install failed"
    if drive.first_order_s is not None and now_s >= drive.first_order_s + node.site.abandon_after_s:
        return reason or f"K3s is not ready after {node.site.abandon_after_s:.0f} s"
    return None


def own_seal(node: Node) -> Seal | None:
    """The seal that this init node may propose: its server is ready."""
    order = node.drive.order
    if order is None or order.action is not Action.INIT or node.drive.outcome is not Outcome.DONE:
        return None
    url = own_url(node)
    if not node.k3s.ready or node.k3s.ca_hash is None or url is None:
        return None
    return Seal(
        ca_hash=node.k3s.ca_hash,
        addresses=(*fixed_urls(node), url),
        shared_flags=node.facts.shared_flags if node.facts else {},
    )


def flag_mismatch(node: Node) -> str | None:
    """A flag that all servers must share and that is set differently here (K3S.md 4)."""
    if node.seal is None or node.facts is None or node.is_init:
        return None
    theirs = node.seal.shared_flags
    wrong = [
        f"{flag} is {value} here but {theirs.get(flag, 'not set')} in the cluster"
        for flag, value in sorted(node.facts.shared_flags.items())
        if theirs.get(flag) != value
    ]
    if not wrong:
        return None
    return "; ".join(wrong) + "; set the cluster's value here, and restart k3sagentd"


def is_member(node: Node) -> bool:
    """Whether this machine's K3s data belongs to the sealed cluster: it only needs starting."""
    facts, seal = node.facts, node.seal
    if facts is None or seal is None:
        return False
    if is_other_role(node):
        return False
    if node.k3s.ready and node.k3s.ca_hash == seal.ca_hash:
        return True
    if facts.datastore is Datastore.ETCD:
        return facts.ca_hash == seal.ca_hash
    return facts.datastore is Datastore.AGENT and facts.ca_hash in (None, seal.ca_hash)


def join_barrier(node: Node) -> str | None:
    """What a server that is prepared waits for before it may join; None when it is its turn."""
    nomination = node.nomination
    if nomination is None or k3s_role(node) is not ServerOrAgent.SERVER:
        return None
    heard = {hello.node: hello for hello in node.up}
    founders = node.roster.servers
    turn = founders.index(node.id) if node.id in founders else len(founders)
    unprepared = [f for f in founders if f != node.id and not _prepared(heard.get(f))]
    if unprepared:
        return f"{_names(node, unprepared)} to be prepared (servers join when all are)"
    if node.now_s >= barrier_until_s(node):
        return None  # its K3s is broken, which must not keep the others few
    unready = [f for f in founders[:turn] if heard[f].server_url is None]
    return f"server {_names(node, unready[:1])} to be ready first" if unready else None


def barrier_until_s(node: Node) -> float:
    """Until when a server that is prepared waits for those before it to be ready."""
    return node.drive.ordered_s + node.site.replace_after_s


def _prepared(hello: Hello | None) -> bool:
    return hello is not None and (hello.prepared or hello.server_url is not None)


def _names(node: Node, ids: list[NodeId]) -> str:
    return ", ".join(node.name_of(each) for each in ids)
