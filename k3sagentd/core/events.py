# SPDX-License-Identifier: Apache-2.0
"""What happens to a node. Each event carries the monotonic time of its arrival in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from k3sagentd.core.cluster import ErrandResult
from k3sagentd.core.k3s import Facts, K3sState, Result
from k3sagentd.core.messages import Hello, LeaveStep, Message
from k3sagentd.core.words import NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time went on; sent when ``deadline()`` has passed, and once at the start."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReceived:
    """An authenticated node told of itself."""

    now_s: float
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost:
    """The connection to a peer broke, or it could not be made again."""

    now_s: float
    peer: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRefused:
    """Someone at ``address`` could not be taken as a peer, or did not take us."""

    now_s: float
    address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReceived:
    """An authenticated node sent a message."""

    now_s: float
    sender: NodeId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressChanged:
    """The address of the chosen interface; None while it has none. It may be set before there is
    a ``carrier``, that is, anybody at the other end."""

    now_s: float
    address: str | None
    carrier: bool = True
    also: tuple[str, ...] = ()
    """Further addresses that the machine has, on whatever interface."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsRead:
    """Root looked at this machine's K3s data."""

    now_s: float
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRead:
    """``apply`` said how far an order is."""

    now_s: float
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrandEnded:
    """Root did an errand, or could not."""

    now_s: float
    result: ErrandResult


@dataclass(frozen=True, slots=True, kw_only=True)
class K3sProbed:
    """A look at the running K3s gave something new."""

    now_s: float
    state: K3sState


@dataclass(frozen=True, slots=True, kw_only=True)
class InitForced:
    """The operator decides instead of a quorum: this node starts the cluster."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsked:
    """The operator takes this machine out of the cluster, and is at this step."""

    now_s: float
    step: LeaveStep


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistFailed:
    """The disk refused our state; effects that depend on it are held back until it takes it."""

    now_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistRecovered:
    """The disk takes our state again."""

    now_s: float


Event = (
    Tick
    | HelloReceived
    | PeerLost
    | PeerRefused
    | MessageReceived
    | AddressChanged
    | FactsRead
    | ResultRead
    | ErrandEnded
    | K3sProbed
    | InitForced
    | LeaveAsked
    | PersistFailed
    | PersistRecovered
)
