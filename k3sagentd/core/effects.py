# SPDX-License-Identifier: Apache-2.0
"""What the shell must do, in the order given: a later effect may depend on an earlier one.

``Persist`` must be durable (fsync of the file and of its directory) before any later effect of
the same or a later batch is carried out. ``Send`` may be lost; everything else may not.
"""

from __future__ import annotations

from dataclasses import dataclass

from k3sagentd.core.cluster import Errand
from k3sagentd.core.k3s import Order
from k3sagentd.core.messages import Hello, Message
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId, short


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Make this the durable state."""

    durable: Durable

    def describe(self) -> str:
        """As people read it."""
        return f"persist {self.durable.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message to a peer, once."""

    to: NodeId
    message: Message

    def describe(self) -> str:
        """As people read it."""
        return f"send {short(self.to)} {self.message.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Tell whoever watches us: this is what we are now."""

    hello: Hello

    def describe(self) -> str:
        """As people read it."""
        return f"announce {self.hello.phase}, revision {self.hello.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOrder:
    """Ask root to make this machine's K3s so."""

    order: Order

    def describe(self) -> str:
        """As people read it."""
        return f"order {self.order.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteErrand:
    """Ask root to do this in the cluster's API."""

    errand: Errand

    def describe(self) -> str:
        """As people read it."""
        return self.errand.describe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell the operator that something changed, in one line."""

    text: str

    def describe(self) -> str:
        """The line itself."""
        return self.text


Effect = Persist | Send | Announce | WriteOrder | WriteErrand | Report
