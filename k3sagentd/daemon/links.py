# SPDX-License-Identifier: Apache-2.0
"""Links to peers: one task per place where one may listen, which watches it and carries messages.

A link learns from TLS who is there. While it hears the peer it holds a long poll, which costs
nothing until one of both changes.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections import deque
from typing import Any

from k3sagentd.core.events import HelloReceived, MessageReceived, PeerLost, PeerRefused
from k3sagentd.core.messages import Hello, Message
from k3sagentd.core.words import NodeId
from k3sagentd.daemon.engine import Engine
from k3sagentd.discovery.table import Source, Table, Target
from k3sagentd.errors import PeerError
from k3sagentd.peer import wire
from k3sagentd.peer.client import PeerClient, PeerRefusedError, PeerUnreachableError, Reply

log = logging.getLogger(__name__)

WATCH_FORMING_S = 50.0
WATCH_SEALED_S = 240.0
MARGIN_S = 15.0
"""What an answer may take beyond the time that the watch was to be held."""
EXCHANGE_TIMEOUT_S = 10.0
RETRY_S = 0.5
RETRY_LIMIT_S = 30.0
FORGET_S = 600.0
"""A place that nobody names any more is knocked at for this long."""
TWIN_PAUSE_S = 30.0
"""Before a second way to a peer that is heard already is tried again."""
OUTBOX_LIMIT = 256
CONNECTS_LIMIT = 32
"""Knocks at a time at places that never proved to be peers."""


class Links:
    """All links of this node."""

    def __init__(self, engine: Engine, client: PeerClient, wait_forming_s: float) -> None:
        self._engine = engine
        self._client = client
        self._forming_s = min(WATCH_FORMING_S, wait_forming_s)
        self._table = Table()
        self._tasks: dict[Target, asyncio.Task[None]] = {}
        self._wakes: dict[Target, asyncio.Event] = {}
        self._at: dict[NodeId, Target] = {}
        self._outboxes: dict[NodeId, deque[Message]] = {}
        self._senders: dict[NodeId, asyncio.Task[None]] = {}
        self._connects = asyncio.Semaphore(CONNECTS_LIMIT)
        self._clocks: dict[NodeId, float] = {}
        self.hello: Hello | None = None

    # --- targets ----------------------------------------------------------------------------

    def sighted(self, target: Target, source: Source) -> None:
        """Something may listen at ``target``: knock now."""
        evicted = self._table.add(target, source)
        if evicted is not None:
            self._stop(evicted)
        if target not in self._table:
            return
        if target in self._tasks:
            self._wakes[target].set()
            return
        self._wakes[target] = asyncio.Event()
        self._tasks[target] = asyncio.create_task(self._follow(target))

    def gone(self, target: Target, source: Source) -> None:
        """``source`` does not name it any more; a link that works goes on."""
        self._table.withdraw(target, source)

    def called(self, peer: NodeId, target: Target) -> None:
        """A peer called us and says that it listens at ``target``."""
        if peer not in self._at:
            self.sighted(target, Source.CALLER)

    def clocks(self) -> dict[str, float]:
        """By node: its clock less CLOCK_MONOTONIC here, for our own clock may be set meanwhile."""
        return {str(peer): at_boot_s for peer, at_boot_s in self._clocks.items()}

    def _heard_clock(self, reply: Reply) -> None:
        try:
            there = email.utils.parsedate_to_datetime(reply.date or "")
        except ValueError:
            return
        self._clocks[reply.peer] = there.timestamp() - time.monotonic()

    async def close(self) -> None:
        """Stop all."""
        tasks = [*self._tasks.values(), *self._senders.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop(self, target: Target) -> None:
        task = self._tasks.pop(target, None)
        self._wakes.pop(target, None)
        if task is not None:
            task.cancel()

    # --- watching ---------------------------------------------------------------------------

    async def _follow(self, target: Target) -> None:
        """Knock, watch, and knock again after a growing pause."""
        pause_s, failing_since_s = RETRY_S, time.monotonic()
        while True:
            peer = await self._watch_while_up(target)
            if peer is not None:
                pause_s, failing_since_s = RETRY_S, time.monotonic()
                twin = self._at.get(peer)
                if twin is not None and twin != target:
                    pause_s = TWIN_PAUSE_S
            elif time.monotonic() - failing_since_s > FORGET_S and not self._table.named(target):
                break
            self._wakes[target].clear()
            try:
                await asyncio.wait_for(self._wakes[target].wait(), pause_s)
                pause_s = RETRY_S
            except TimeoutError:
                pause_s = min(RETRY_LIMIT_S, pause_s * 2)
        self._table.drop(target)
        self._tasks.pop(target, None)
        self._wakes.pop(target, None)

    async def _watch_while_up(self, target: Target) -> NodeId | None:
        """Watch ``target`` until the connection breaks; None where no peer ever answered."""
        peer: NodeId | None = None
        known: Hello | None = None
        try:
            while True:
                reply = await self._watch_once(target, known)
                answer = wire.decode(wire.WatchAnswer, reply.body)
                if answer.hello.node != reply.peer:
                    raise PeerError("its hello is of another node than its certificate")
                known = answer.hello
                twin = self._at.get(reply.peer)
                if twin is not None and twin != target:
                    return reply.peer
                if peer is None:
                    self._table.prove(target, proven=True)
                peer = reply.peer
                self._at[peer] = target
                self._heard_clock(reply)
                self._engine.feed(HelloReceived(now_s=time.monotonic(), hello=known))
                self._flush(peer)
        except PeerUnreachableError as error:
            log.debug("%s: %s", target, error)
        except (PeerRefusedError, PeerError) as error:
            self.refused(target.address, str(error))
        finally:
            self._table.prove(target, proven=False)
            if peer is not None and self._at.get(peer) == target:
                del self._at[peer]
                self._engine.feed(PeerLost(now_s=time.monotonic(), peer=peer))
        return peer

    async def _watch_once(self, target: Target, known: Hello | None) -> Reply:
        assert self.hello is not None, "announced before it knocks"
        sealed = self._engine.node.seal is not None
        wait_s = WATCH_SEALED_S if sealed else self._forming_s
        request = wire.WatchRequest(
            hello=self.hello,
            known_instance=known.instance if known else None,
            known_revision=known.revision if known else 0,
            wait_s=wait_s if known else 0.0,
        )
        post = self._client.post(
            target.address, target.port, "/v1/watch", wire.encode(request), wait_s + MARGIN_S
        )
        if known is not None:
            return await post
        async with self._connects:
            return await post

    def refused(self, address: str, reason: str) -> None:
        """Tell the core, unless it knows."""
        if self._engine.node.refused.get(address) != reason:
            self._engine.feed(
                PeerRefused(now_s=time.monotonic(), address=address, reason=reason[:200])
            )

    # --- messages ---------------------------------------------------------------------------

    def send(self, to: NodeId, message: Message) -> None:
        """Put a message into the peer's outbox; the oldest is lost when it overflows."""
        self._outboxes.setdefault(to, deque(maxlen=OUTBOX_LIMIT)).append(message)
        self._flush(to)

    def _flush(self, peer: NodeId) -> None:
        if peer in self._senders or not self._outboxes.get(peer) or peer not in self._at:
            return
        task = asyncio.create_task(self._deliver(peer))
        self._senders[peer] = task
        task.add_done_callback(lambda _: self._senders.pop(peer, None))

    async def _deliver(self, peer: NodeId) -> None:
        outbox = self._outboxes[peer]
        while outbox and (target := self._at.get(peer)) is not None:
            batch = [outbox.popleft() for _ in range(min(len(outbox), wire.MESSAGES_LIMIT))]
            body = wire.encode(wire.exchange(batch))
            try:
                reply = await self._client.post(
                    target.address, target.port, "/v1/exchange", body, EXCHANGE_TIMEOUT_S
                )
                if reply.peer != peer:
                    raise PeerError("another node answers there now")
                for message in wire.decode(wire.Exchange, reply.body).messages:
                    self._engine.feed(
                        MessageReceived(now_s=time.monotonic(), sender=peer, message=message)
                    )
            except PeerUnreachableError as error:
                log.debug("messages to %s are lost: %s", target, error)
            except (PeerRefusedError, PeerError) as error:
                self.refused(target.address, str(error))


class Receiver:
    """Answers peers that call us: the handler of ``PeerServer``."""

    def __init__(self, engine: Engine, links: Links) -> None:
        self._engine = engine
        self._links = links
        self._news = asyncio.Event()

    def announce(self, hello: Hello) -> None:
        """Answer every watch that is held."""
        self._links.hello = hello
        self._news.set()
        self._news = asyncio.Event()

    async def watch(self, peer: NodeId, address: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take in who asks, and answer once we are not what it knows."""
        request = wire.decode(wire.WatchRequest, body)
        if request.hello.node != peer:
            raise PeerError("the hello is of another node than the certificate")
        if peer == self._engine.node.id:  # a clone; others count once we reach them ourselves
            self._engine.feed(HelloReceived(now_s=time.monotonic(), hello=request.hello))
        self._links.called(peer, Target(address, request.hello.port))
        deadline_s = time.monotonic() + min(max(request.wait_s, 0.0), wire.WAIT_LIMIT_S)
        while self._known(request) and (left_s := deadline_s - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._news.wait(), left_s)
            except TimeoutError:
                break
        assert self._links.hello is not None, "announced before it listens"
        return wire.encode(wire.WatchAnswer(hello=self._links.hello))

    def _known(self, request: wire.WatchRequest) -> bool:
        hello = self._links.hello
        return (
            hello is not None
            and request.known_instance == hello.instance
            and request.known_revision >= hello.revision
        )

    async def exchange(self, peer: NodeId, address: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take messages in, answer with what they cause."""
        now_s = time.monotonic()
        messages = wire.decode(wire.Exchange, body).messages
        replies = await self._engine.exchange(
            peer,
            [MessageReceived(now_s=now_s, sender=peer, message=each) for each in messages],
        )
        return wire.encode(wire.exchange(replies[: wire.MESSAGES_LIMIT]))
