# SPDX-License-Identifier: Apache-2.0
"""Runs the core: one event at a time, its effects in order, durable ones before the rest."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, assert_never

from k3sagentd import store
from k3sagentd.core import machine
from k3sagentd.core.cluster import Errand
from k3sagentd.core.effects import (
    Announce,
    Effect,
    Persist,
    Report,
    Send,
    WriteErrand,
    WriteOrder,
)
from k3sagentd.core.events import Event, PersistFailed, PersistRecovered, Tick
from k3sagentd.core.k3s import Order
from k3sagentd.core.messages import Hello, Message
from k3sagentd.core.state import Durable, Node
from k3sagentd.core.words import NodeId

log = logging.getLogger(__name__)

PERSIST_RETRY_S = 2.0
EVENTS_KEPT = 60
"""Reports that are kept for whoever asks what happened."""


class Outward(Protocol):
    """Where the effects that are not the disk's go."""

    def send(self, to: NodeId, message: Message) -> None:
        """Send once; may be lost."""

    def announce(self, hello: Hello) -> None:
        """Tell whoever watches."""

    def order(self, order: Order) -> None:
        """Ask root."""

    def errand(self, errand: Errand) -> None:
        """Ask root to do something in the cluster's API."""


class Engine:
    """The one owner of the node's state."""

    def __init__(self, node: Node, state: Path, outward: Outward) -> None:
        self.node = node
        self.revision = 0
        self.reports: deque[tuple[int, float, str]] = deque(maxlen=EVENTS_KEPT)
        self._reported = 0
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self._state = state
        self._outward = outward
        self._queue: deque[tuple[Event, asyncio.Future[None] | None]] = deque()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._replies: dict[NodeId, list[list[Message]]] = {}
        self.on_change: Callable[[], None] = lambda: None

    def feed(self, event: Event) -> None:
        """Hand an event over; it is taken in its turn."""
        self._queue.append((event, None))
        self._wake.set()

    async def carry_out(self, event: Event) -> None:
        """Hand an event over and wait until its effects are carried out."""
        done = asyncio.get_running_loop().create_future()
        self._queue.append((event, done))
        self._wake.set()
        await done

    async def exchange(self, peer: NodeId, events: list[Event]) -> list[Message]:
        """Take messages of ``peer`` in; what is sent to it meanwhile is the answer."""
        replies: list[Message] = []
        self._replies.setdefault(peer, []).append(replies)
        try:
            for event in events:
                await self.carry_out(event)
        finally:
            self._replies[peer] = [each for each in self._replies[peer] if each is not replies]
            if not self._replies[peer]:
                del self._replies[peer]
        return replies

    async def changed(self, revision: int, wait_s: float) -> None:
        """Return when the state is newer than ``revision``, or after ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while self.revision <= revision:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return

    async def run(self) -> None:
        """Take events for ever, and a Tick whenever the core wants one."""
        self.feed(Tick(now_s=time.monotonic()))
        while True:
            while self._queue:
                event, done = self._queue.popleft()
                try:
                    await self._step(event)
                finally:
                    if done is not None and not done.done():
                        done.set_result(None)
            self._wake.clear()
            at_s = machine.deadline(self.node)
            try:
                pause_s = None if at_s is None else max(0.0, at_s - time.monotonic())
                await asyncio.wait_for(self._wake.wait(), pause_s)
            except TimeoutError:
                self.feed(Tick(now_s=time.monotonic()))

    async def _step(self, event: Event) -> None:
        before = self.node
        self.node, effects = machine.step(self.node, event)
        pending = deque(effects)
        while pending:
            effect = pending.popleft()
            if log.isEnabledFor(logging.DEBUG) and not isinstance(effect, Report):
                log.debug("%s", effect.describe())
            pending.extend(await self._do(effect))
        if effects or _differs(before, self.node):
            self._tell()

    def _tell(self) -> None:
        """There is news for whoever waits for it."""
        self.revision += 1
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_change()

    async def _do(self, effect: Effect) -> tuple[Effect, ...]:
        """Carry an effect out; what follows from its failure comes after all that is held back."""
        match effect:
            case Persist(durable=durable):
                return await self._persist(durable)
            case Send(to=to, message=message):
                if collectors := self._replies.get(to):
                    collectors[-1].append(message)
                else:
                    self._outward.send(to, message)
            case Announce(hello=hello):
                self._outward.announce(hello)
            case WriteOrder(order=order):
                self._outward.order(order)
            case WriteErrand(errand=errand):
                self._outward.errand(errand)
            case Report(text=text):
                self._reported += 1
                self.reports.append((self._reported, time.time(), text))
                log.info("%s", text)
            case _:
                assert_never(effect)
        return ()

    async def _persist(self, durable: Durable) -> tuple[Effect, ...]:
        """Hold everything back until the disk has it; say so while it does not take it."""
        failed = False
        later: tuple[Effect, ...] = ()
        while True:
            try:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._disk, store.save, self._state, durable)
                break
            except OSError as error:
                if not failed:
                    reason = f"{error.strerror} ({self._state})"
                    log.error("cannot write the state: %s", reason)
                    # Not by the queue: that is held back as well, until the disk takes the state.
                    event = PersistFailed(now_s=time.monotonic(), reason=reason)
                    self.node, later = machine.step(self.node, event)
                    self._tell()
                    failed = True
                await asyncio.sleep(PERSIST_RETRY_S)
        if failed:
            self.feed(PersistRecovered(now_s=time.monotonic()))
        return later


def _differs(before: Node, after: Node) -> bool:
    """Whether anything but the time changed (identity suffices: parts are replaced, not edited)."""
    return any(
        getattr(before, name) is not getattr(after, name)
        for name in (
            "peers",
            "refused",
            "proposal",
            "facts",
            "k3s",
            "drive",
            "steward",
            "leaving",
            "address",
            "also",
            "phase",
        )
    )
