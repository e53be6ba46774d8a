# SPDX-License-Identifier: Apache-2.0
"""What the shell must do, in the order given: a later effect may depend on an earlier one.

``Persist`` must be durable (fsync of the file and of its directory) before any later effect of
the same or a later batch is carried out. ``Send`` may be lost; everything else may not.
"""

from __future__ import annotations

from dataclasses import dataclass

from k3sagentd.core.k3s import Order
from k3sagentd.core.messages import Hello, Message
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Make this the durable state."""

    durable: Durable


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message to a peer, once."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Tell whoever watches us: this is what we are now."""

    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOrder:
    """Ask root to make this machine's K3s so."""

    order: Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell the operator that something changed, in one line."""

    text: str


Effect = Persist | Send | Announce | WriteOrder | Report
