# SPDX-License-Identifier: Apache-2.0
"""What the removal of a server does to the quorum of etcd. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from k3sagentd.core.cluster import KubeNode


def quorum(servers: int) -> int:
    """How many of ``servers`` must live for etcd to take a write."""
    return servers // 2 + 1


def removal_trouble(nodes: Sequence[KubeNode], name: str) -> str | None:
    """Why the Node ``name`` must not be deleted now; None where it may, or has no member."""
    servers = [node for node in nodes if node.server]
    if not any(node.name == name for node in servers):
        return None
    others = [node for node in servers if node.name != name]
    if not others:
        return f"removing {name} would cost the quorum: it is the last server"
    ready = [node.name for node in others if node.ready]
    needed = quorum(len(others))
    if len(ready) >= needed:
        return None
    rest = ", ".join(node.name for node in others if not node.ready)
    return (
        f"removing {name} would cost the quorum: of the other {len(others)} servers {len(ready)} "
        f"are ready, {needed} must be; not ready: {rest}"
    )
