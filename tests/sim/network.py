# SPDX-License-Identifier: Apache-2.0
"""The wire of the simulated site: who reaches whom, how late, and what is lost.

Keeps to ``daemon/links.py``: a peer is up while a connection both ways is held, its end is noticed
after the keepalive, messages to a peer that is away wait for it.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from k3sagentd import keys
from k3sagentd.core.events import HelloReceived, MessageReceived, PeerLost
from k3sagentd.core.messages import Hello, Message
from k3sagentd.core.words import NodeId
from tests.sim import root
from tests.sim.computer import Computer
from tests.sim.dice import Fault

if TYPE_CHECKING:
    from tests.sim.world import World

KEEPALIVE_S = 5.0
"""Until a peer without power is noticed at the earliest; twice that at the latest."""
OUTBOX_LIMIT = 256
LATE_S = 20.0
"""How late a message may be."""
VALID_S = tuple(
    (each - datetime.datetime(1970, 1, 1)).total_seconds()
    for each in (keys.NOT_BEFORE, keys.NOT_AFTER)
)
"""The span of wall clock in which a certificate is valid."""


class Network:
    """All that lies between the machines of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.cuts: dict[int, frozenset[tuple[int, int]]] = {}
        self._links: set[tuple[int, int]] = set()

    def wired(self, a: Computer, b: Computer) -> bool:
        """Whether packets go both ways between two machines that are on."""
        if not (a.on and b.on) or a is b:
            return False
        return not self.cuts or not (
            self._is_cut(a.number, b.number) or self._is_cut(b.number, a.number)
        )

    def _is_cut(self, a: int, b: int) -> bool:
        return any((a, b) in cut for cut in self.cuts.values())

    def linked(self, a: Computer, b: Computer) -> bool:
        """Whether two daemons hold connections: both certificates are valid now."""
        if a.node is None or b.node is None or not self.wired(a, b):
            return False
        return all(VALID_S[0] <= m.wall_s + self._world.now_s <= VALID_S[1] for m in (a, b))

    def partition(self, *groups: set[int]) -> None:
        """Only machines that share a group reach each other; a node in two sees both sides."""
        numbers = range(len(self._world.computers))
        self.cuts[0] = frozenset(
            (a, b)
            for a in numbers
            for b in numbers
            if a != b and groups and not any({a, b} <= group for group in groups)
        )
        self.relink_all()

    def relink_all(self) -> None:
        """The wire changed."""
        for m in self._world.computers:
            self.relink(m)
        root.stir(self._world)

    def relink(self, m: Computer) -> None:
        """Have the daemons notice, sooner or later, whom they reach."""
        for other in self._world.computers:
            if other is m:
                continue
            pair = (min(m.number, other.number), max(m.number, other.number))
            linked = self.linked(m, other)
            if linked and pair not in self._links:
                self._links.add(pair)
                for here, there in ((m, other), (other, m)):
                    self._world.at(self._delay(here), self._connect, here, there)
            elif not linked and pair in self._links:
                self._links.discard(pair)
                silent = not (m.on and other.on) or not self.wired(m, other)
                for here, there in ((m, other), (other, m)):
                    wait_s = KEEPALIVE_S * (1 + self._world.dice.uniform(11, self._world.scheduled))
                    wait_s = wait_s if silent else self._delay(here)
                    self._world.at(wait_s, self._lose, here, there, there.id)

    def _connect(self, here: Computer, there: Computer) -> None:
        if self.linked(here, there):
            self._greet(here, there, there.hello)
            for message in here.outbox.pop(there.id, []):
                self._transmit(here, there, message)

    def _greet(self, here: Computer, there: Computer, hello: Hello | None) -> None:
        if hello is not None and self.linked(here, there) and not there.paused:
            self._world.feed(here, HelloReceived(now_s=here.clock(self._world.now_s), hello=hello))

    def _lose(self, here: Computer, there: Computer, id: NodeId) -> None:
        if there.id != id or not self.linked(here, there):
            self.lost(here, there, id)

    def lost(self, here: Computer, there: Computer, id: NodeId) -> None:
        """A connection broke, and there is no other to the same identity."""
        if here.node is not None and not any(
            other is not there and other.id == id and self.linked(here, other)
            for other in self._world.computers
        ):
            self._world.feed(here, PeerLost(now_s=here.clock(self._world.now_s), peer=id))

    def publish(self, m: Computer, process: int) -> None:
        """All that watch one machine are told of it."""
        if m.process != process:
            return
        m.publishing = False
        for other in self._world.computers:
            if other is not m and self.linked(m, other):
                self.tell_hello(m, other)

    def tell_hello(self, m: Computer, other: Computer) -> None:
        """A long poll is answered."""
        self._world.at(self._delay(m), self._greet, other, m, m.hello)

    def send(self, m: Computer, to: NodeId, message: Message) -> None:
        """Send once, now or when the peer is there; to a cloned identity, to one of them."""
        there = [c for c in self._world.computers if c.id == to and c is not m]
        linked = [c for c in there if self.linked(m, c)]
        if linked:
            self._transmit(m, linked[m.sent % len(linked)], message)
        elif there and len(m.outbox.setdefault(to, [])) < OUTBOX_LIMIT:
            m.outbox[to].append(message)

    def _transmit(self, m: Computer, there: Computer, message: Message) -> None:
        m.sent += 1
        if self._world.strikes(Fault.LOSS, m.number, m.sent):
            return
        copies = 2 if self._world.strikes(Fault.DUPLICATE, m.number, m.sent) else 1
        for copy in range(copies):
            delay_s = self._world.dice.exponential(
                self._world.plan.delay_s, 12, m.number, m.sent, copy
            )
            if self._world.strikes(Fault.DELAY, m.number, m.sent, copy):
                delay_s += LATE_S * self._world.dice.uniform(13, m.number, m.sent, copy)
            self._world.at(delay_s, self._arrive, m.id, m.number, there, message)

    def _arrive(self, sender: NodeId, number: int, there: Computer, message: Message) -> None:
        if there.on and not self._is_cut(number, there.number):
            now_s = there.clock(self._world.now_s)
            self._world.feed(there, MessageReceived(now_s=now_s, sender=sender, message=message))

    def _delay(self, m: Computer) -> float:
        return self._world.dice.exponential(
            self._world.plan.delay_s, 14, m.number, self._world.scheduled
        )
