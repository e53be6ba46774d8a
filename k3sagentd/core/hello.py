# SPDX-License-Identifier: Apache-2.0
"""What a node tells of itself, computed from its state; and what follows for its K3s role."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter, is_

from k3sagentd.core import guards, ranking
from k3sagentd.core.k3s import Datastore, ServerOrAgent
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.words import Role

K3S_PORT = 6443
parts = attrgetter("announced", "site", "durable", "address", "phase", "facts", "drive", "k3s")
"""The parts of a node that its hello is made of."""


def k3s_role(node: Node) -> ServerOrAgent | None:
    """What this node's K3s is to be; None before the seal, except on the init node."""
    nomination = node.nomination
    if nomination is None or (node.seal is None and not node.is_init):
        return None
    founder = node.id in nomination.servers
    member = node.facts is not None and node.facts.datastore is Datastore.ETCD
    if founder or member or node.site.role is Role.SERVER:
        return ServerOrAgent.SERVER
    return ServerOrAgent.AGENT


def server_url(node: Node) -> str | None:
    """Where others reach this node's server, once the site is sealed and it is ready."""
    ready = node.k3s.ready and node.seal is not None
    if not ready or k3s_role(node) is not ServerOrAgent.SERVER:
        return None
    return own_url(node)


def own_url(node: Node) -> str | None:
    """``https://host:6443`` of this machine."""
    return None if node.address is None else url_of(node.address)


def url_of(host: str) -> str:
    """The registration address for a host name or an IP address (RFC 3986, section 3.2.2)."""
    return f"https://[{host}]:{K3S_PORT}" if ":" in host else f"https://{host}:{K3S_PORT}"


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
    )
    if before is not None and hello != before:
        return replace(hello, revision=before.revision + 1)
    return hello
