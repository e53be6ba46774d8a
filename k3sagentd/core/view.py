# SPDX-License-Identifier: Apache-2.0
"""What a node says of itself and of the site to programs: the JSON of the design, section 6."""

from __future__ import annotations

from typing import Any

from k3sagentd.core import leaving, log, registration, roster, status
from k3sagentd.core.hello import fixed_urls, k3s_role, own_hello
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodePhase, SitePhase


def site_phase(node: Node) -> SitePhase:
    """Where the site stands, as this node sees it."""
    if node.phase is NodePhase.CONFLICT:
        return SitePhase.CONFLICT
    if node.seal is not None:
        return SitePhase.SEALED
    if node.nomination is not None:
        return SitePhase.NOMINATED
    return SitePhase.ELECTING if node.phase is NodePhase.ELECTING else SitePhase.DISCOVERING


def shown_role(node: Node) -> str:
    """K3s's role once it is known, else what the operator asked for."""
    return str(k3s_role(node) or node.site.role)


def as_json(node: Node, now_s: float) -> dict[str, Any]:
    """What ``k3sagentd status --json`` prints."""
    seal, nomination = node.seal, node.nomination
    handed_out = registration.registration(node, node.id, ServerOrAgent.AGENT)
    own = own_hello(node)
    fixed = fixed_urls(node) if handed_out else ()
    urls = {*(handed_out.servers if handed_out else ()), *fixed}
    if own.server_url:
        urls.add(own.server_url)
    return {
        "site": {
            "id": None,
            "phase": str(site_phase(node)),
            "epoch": log.epoch(node.log),
            "nodes": node.nodes,
            "servers": node.site.servers,
            "seen": node.seen,
            "quorum": node.quorum,
            "init_node": nomination.init if nomination else None,
            "ca_hash": seal.ca_hash if seal else None,
            "registration": [*fixed, *sorted(urls - set(fixed))],
            "roster": list(roster.members(node)),
            "generation": node.generation.number,
            "votes": node.votes.get(len(node.log) - 1),
        },
        "node": {
            "id": node.id,
            "name": own.node_name or own.hostname,
            "address": node.address,
            "role": shown_role(node),
            "phase": str(node.phase),
            "waiting_for": status.waiting_for(node, now_s),
            "leaving": leaving.waits_for(node),
            "notes": status.notes(node, now_s),
            "refused": [{"address": a, "reason": r} for a, r in node.refused.items()],
        },
        "nodes": sorted(
            [_row(own, 0.0), *_peer_rows(node, now_s)], key=lambda row: (row["name"], row["id"])
        ),
    }


def _peer_rows(node: Node, now_s: float) -> list[dict[str, Any]]:
    return [
        _row(peer.hello, 0.0 if peer.up else max(0.1, now_s - peer.heard_s))
        for peer in node.peers.values()
    ]


def _row(hello: Hello, age_s: float) -> dict[str, Any]:
    """``age_s`` is 0 for who is heard, and for nobody else."""
    return {
        "id": hello.node,
        "name": hello.node_name or hello.hostname,
        "address": hello.address,
        "role": str(hello.k3s_role or hello.role),
        "phase": str(hello.phase),
        "age_s": round(age_s, 1),
        "member": hello.member,
        "moved": hello.moved,
    }
