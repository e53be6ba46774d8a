# SPDX-License-Identifier: Apache-2.0
"""One step under way: the node as it becomes, and the effects in the order they must happen.

Mutable, but it lives only inside ``machine.step``, which stays a pure function.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from k3sagentd.core.effects import Effect, Persist, Report, Send
from k3sagentd.core.messages import Message
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId


class Turn:
    """Collects what one event changes."""

    __slots__ = ("effects", "node", "now_s")

    def __init__(self, node: Node, now_s: float) -> None:
        self.node = node
        self.now_s = now_s
        self.effects: list[Effect] = []

    def set(self, **changes: Any) -> None:
        """Change what is lost with the process."""
        self.node = self.node.but(**changes)

    def drive(self, **changes: Any) -> None:
        """Change where the drive of K3s stands."""
        self.node = self.node.but(drive=replace(self.node.drive, **changes))

    def persist(self, **changes: Any) -> None:
        """Change the durable state; every effect added from here on comes after it."""
        durable = replace(self.node.durable, **changes)
        self.node = self.node.but(durable=durable)
        if self.effects and isinstance(self.effects[-1], Persist):
            self.effects[-1] = Persist(durable=durable)
        else:
            self.effects.append(Persist(durable=durable))

    def send(self, to: NodeId, message: Message) -> None:
        """Send to one peer."""
        self.effects.append(Send(to=to, message=message))

    def send_all(self, message: Message) -> None:
        """Send to every peer that is up."""
        for hello in self.node.up:
            self.send(hello.node, message)

    def report(self, text: str) -> None:
        """Tell the operator."""
        self.effects.append(Report(text=text))
