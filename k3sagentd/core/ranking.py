# SPDX-License-Identifier: Apache-2.0
"""Who is best fit to start the cluster, in one order that all token holders compute alike."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from functools import lru_cache

from k3sagentd.core import guards
from k3sagentd.core.log import abandonments
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId, Role

FITNESS_LIMITS_MS = (10.0, 50.0)
"""Upper bounds of the classes of fsync latency. etcd's documentation asks for a 99th percentile
below 10 ms (etcd docs, "Hardware recommendations"); beyond 50 ms it loses leaders."""


def fitness_class(fsync_ms: float | None) -> int:
    """0 for a disk that suits etcd, then 1 and 2; what was not measured counts as worst."""
    if fsync_ms is None:
        return len(FITNESS_LIMITS_MS)
    return sum(fsync_ms > limit for limit in FITNESS_LIMITS_MS)


@lru_cache(maxsize=1024)
def lot(election_key: bytes, node: NodeId) -> bytes:
    """The node's lot: cannot be predicted or bought without the token."""
    return hmac.digest(election_key, node.encode(), hashlib.sha256)


def may_lead(hello: Hello) -> bool:
    """Whether a node may be nominated and propose: agents and the muted may not."""
    return hello.role is not Role.AGENT and hello.may_vote


def ranked(node: Node, hellos: Iterable[Hello]) -> list[Hello]:
    """Those who may lead, best first.

    An existing cluster comes first (design, 4.4), then whoever failed as init node least often,
    an explicit ``role: server``, the faster disk, and the lot.
    """
    failed = abandonments(node.log)

    def key(hello: Hello) -> tuple[bool, int, bool, int, bytes]:
        return (
            guards.claim(node, hello) is None,
            failed[hello.node],
            hello.role is not Role.SERVER,
            hello.fitness,
            lot(node.site.election_key, hello.node),
        )

    return sorted((hello for hello in hellos if may_lead(hello)), key=key)


def odd(count: int) -> int:
    """The largest odd number up to ``count``: etcd gains nothing from an even member."""
    return count if count % 2 or count == 0 else count - 1
