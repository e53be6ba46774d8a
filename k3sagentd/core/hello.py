# SPDX-License-Identifier: Apache-2.0
"""What a node tells of itself, computed from its state; and what follows for its K3s role."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter, is_

from k3sagentd.core import guards, ranking
from k3sagentd.core.k3s import Action, Datastore, Outcome, ServerOrAgent
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodePhase, Role

K3S_PORT = 6443
parts = attrgetter(
    *("announced", "site", "durable", "address", "also", "phase", "facts", "drive", "k3s")
)
"""The parts of a node that its hello is made of."""


def k3s_role(node: Node) -> ServerOrAgent | None:
    """What this node's K3s is to be; None before the seal, except on the init node.

    ``role: server`` alone makes nobody a server: the number of servers is the site's (``steward``).
    """
    nomination = node.nomination
    if nomination is None or (node.seal is None and not node.is_init):
        return None
    listed = node.id in node.roster.servers
    # Servers of a cluster that was there before the site stand in no roster until one is written
    # that knows of them; and they are not ours to demote.
    unlisted = has_etcd(node) and (node.roster.revision == 0 or is_adopted(node))
    return ServerOrAgent.SERVER if listed or unlisted else ServerOrAgent.AGENT


def is_adopted(node: Node) -> bool:
    """Whether K3s of the sealed cluster was here before us."""
    facts, seal = node.facts, node.seal
    if facts is None or facts.node_name is None or seal is None:
        return False
    return facts.ca_hash == seal.ca_hash


def has_etcd(node: Node) -> bool:
    """Whether there is a member's data on this machine."""
    facts = node.facts
    return facts is not None and facts.datastore is Datastore.ETCD and not facts.removed


def has_moved(node: Node) -> bool:
    """Whether etcd knows this server by an address that this machine does not have (K3S.md 8)."""
    known = node.facts.node_ip if node.facts is not None else None
    if known is None or node.address is None or node.k3s.ready or not has_etcd(node):
        return False
    return known != node.address and known not in node.also


def server_url(node: Node) -> str | None:
    """Where others reach this node's server, once the site is sealed and it is ready."""
    # An agent has no CA to show: it may run while it is made a server.
    ours = node.seal is not None and node.k3s.ca_hash == node.seal.ca_hash
    if not (ours and node.k3s.ready) or k3s_role(node) is not ServerOrAgent.SERVER:
        return None
    return own_url(node)


def own_url(node: Node) -> str | None:
    """``https://host:6443`` of this machine."""
    return None if node.address is None else url_of(node.address)


def url_of(host: str) -> str:
    """The registration address for a host name or an IP address (RFC 3986, section 3.2.2)."""
    return f"https://[{host}]:{K3S_PORT}" if ":" in host else f"https://{host}:{K3S_PORT}"


def may_be_member(node: Node) -> bool:
    """Whether etcd may count on this machine: its data says so, or its server was told to start."""
    order = node.drive.order
    serves = order is not None and order.role is ServerOrAgent.SERVER
    return (serves and may_be_started(node)) or has_etcd(node)


def may_be_started(node: Node) -> bool:
    """Whether K3s may be, or become, what it was last told to be. An order that failed late, as in
    the steps after K3s's start, has that effect all the same."""
    order, outcome, result = node.drive.order, node.drive.outcome, node.drive.result
    if order is None or order.action not in (Action.INIT, Action.JOIN):
        return False
    return outcome in (Outcome.RUNNING, Outcome.DONE) or (result is not None and result.started)


def is_sound(node: Node) -> bool:
    """Whether what was last ordered was done, or is tried for the first time, or changes only what
    K3s is told while it is ready."""
    order, outcome = node.drive.order, node.drive.outcome
    if node.phase is NodePhase.FAILED:
        return False
    return (
        order is None
        or outcome is Outcome.DONE
        or (outcome is Outcome.RUNNING and (order.attempt == 0 or node.phase is NodePhase.READY))
    )


def fixed_urls(node: Node) -> tuple[str, ...]:
    """The registration addresses that stay when servers come and go, best first."""
    return tuple(url_of(each) for each in node.site.fixed_addresses)


def live_servers(node: Node) -> tuple[str, ...]:
    """The addresses of the ready servers that are here now, in an order that all nodes share."""
    found = {hello.address for hello in node.kin if hello.server_url and hello.address}
    if server_url(node) and node.address:
        found.add(node.address)
    return tuple(sorted(found))


def name_answer(node: Node) -> tuple[str, ...]:
    """What this node answers for the cluster's name: only a ready server answers, and all of them
    alike as far as they hear each other."""
    return live_servers(node) if server_url(node) else ()


def may_differ(before: Node, node: Node) -> bool:
    """Whether a part was replaced that the hello is made of."""
    return not all(map(is_, parts(before), parts(node)))


def own_hello(node: Node) -> Hello:
    """What we tell of ourselves; the same revision as before when nothing changed."""
    before = node.announced
    hello = Hello(
        node=node.id,
        instance=node.site.instance,
        revision=before.revision if before else 1,
        hostname=node.site.hostname,
        node_name=node.durable.node_name,
        address=node.address,
        port=node.site.port,
        nodes=node.nodes,
        servers=node.site.servers,
        role=Role.AGENT if node.site.tokenless else node.site.role,
        fitness=ranking.fitness_class(node.facts.fsync_ms if node.facts else None),
        may_vote=node.durable.muted is None and node.facts is not None,
        has_voted=bool(node.log) or not node.durable.acceptor.blank,
        log_length=len(node.log),
        existing=guards.existing_cluster(node),
        existing_epoch=node.facts.origin if node.facts else None,
        datastore=node.facts.datastore if node.facts else Datastore.NONE,
        phase=node.phase,
        k3s_role=k3s_role(node),
        prepared=node.drive.prepared,
        server_url=server_url(node),
        machine=node.site.machine,
        generation=node.generation,
        existing_generation=node.facts.origin_generation if node.facts else 0,
        existing_by=node.facts.origin_node if node.facts else None,
        roster=node.durable.roster,
        member=may_be_member(node),
        adopted=node.facts is not None and node.facts.node_name is not None,
        sound=is_sound(node),
        hardware=node.site.hardware,
        moved=has_moved(node),
    )
    if before is not None and hello != before:
        return replace(hello, revision=before.revision + 1)
    return hello
