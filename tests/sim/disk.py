# SPDX-License-Identifier: Apache-2.0
"""A disk that keeps nothing that it was not told to sync.

It carries out the calls that ``files.write_atomically`` makes (a test traces the real one) and
knows at each moment what a power cut might leave: the old file, the new one, or a torn one.
"""

from __future__ import annotations

from k3sagentd import store
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId

WRITE_ATOMICALLY = ("write", "fsync", "rename", "fsync directory")
"""The calls that make a file durable, in their order."""


class Disk:
    """The state file of one identity."""

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.outcomes: tuple[Durable | None, ...] = (Durable(node=node),)
        """What a power cut now may leave; None is a file that is torn."""
        self._temporary: Durable | None = None
        self._synced = False
        self._torn = b""
        self.damage: int | None = None
        """Where the file was damaged while nobody looked."""

    def save(self, durable: Durable, calls: int | None = None) -> None:
        """Write ``durable``; with ``calls``, only so many calls are made before the power fails."""
        for call in WRITE_ATOMICALLY[:calls]:
            match call:
                case "write":
                    self._temporary, self._synced = durable, False
                case "fsync":
                    self._synced = True
                case "rename":
                    new = (durable,) if self._synced else (durable, None)
                    self.outcomes = (*self.outcomes, *new)
                case _:
                    self.outcomes = (durable,) if self._synced else (durable, None)
        if calls is None:
            self.damage = None

    def power_cut(self, chance: float) -> None:
        """One of the outcomes becomes what is there."""
        left = self.outcomes[int(chance * len(self.outcomes))]
        if left is None:
            self._torn = store.encode(self._temporary or Durable(node=self.node))
            self._torn = self._torn[: int(chance * len(self._torn))]
        self.outcomes = (left,)

    def load(self) -> Durable:
        """What the daemon finds when it starts, by way of the production format."""
        self.outcomes = self.outcomes[-1:]
        left = self.outcomes[0]
        data: bytes | None = self._torn if left is None else store.encode(left)
        if self.damage is not None and data:
            data = _damaged(data, self.damage)
        self.damage = None
        durable, _ = store.restore(data, self.node)
        self.outcomes = (durable,)
        return durable


def _damaged(data: bytes, where: int) -> bytes | None:
    """The file with a bit flipped, cut short, emptied, or gone."""
    at = where % len(data)
    return (data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], data[:at], b"", None)[where % 4]
