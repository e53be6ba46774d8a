# SPDX-License-Identifier: Apache-2.0
"""The words of the design: roles, phases, and what stands for a node.

Every StrEnum value here is the word that an operator reads.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NewType

NodeId = NewType("NodeId", str)
"""Hex SHA-256 of a node's raw Ed25519 public key, cut to 128 bits: 32 characters."""

NODE_ID_LENGTH = 32


def short(node: NodeId) -> str:
    """The first 8 characters of a node id: what is shown to people."""
    return node[:8]


class Role(StrEnum):
    """What the operator asks of a node; ``auto`` leaves it to the site."""

    AUTO = "auto"
    SERVER = "server"
    AGENT = "agent"


class NodePhase(StrEnum):
    """Where one node stands in its life (design, section 6)."""

    UNCONFIGURED = "unconfigured"
    DISCOVERING = "discovering"
    ELECTING = "electing"
    INITIALISING = "initialising"
    WAITING = "waiting"
    JOINING = "joining"
    READY = "ready"
    STANDING_DOWN = "standing-down"
    CONFLICT = "conflict"
    FAILED = "failed"


class SitePhase(StrEnum):
    """Where the site stands, as one node sees it (design, section 6)."""

    DISCOVERING = "discovering"
    ELECTING = "electing"
    NOMINATED = "nominated"
    SEALED = "sealed"
    CONFLICT = "conflict"


def duration(seconds: float) -> str:
    """A span as people say it: ``40 s``, ``5 min``, ``2 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
