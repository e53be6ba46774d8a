# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of this machine's K3s: facts and results in, orders out, probes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set

from k3sagentd.core.events import FactsRead, K3sProbed, ResultRead
from k3sagentd.core.hello import k3s_role
from k3sagentd.core.k3s import Action, Order, Outcome
from k3sagentd.core.words import NodePhase
from k3sagentd.daemon.engine import Engine
from k3sagentd.errors import DataError
from k3sagentd.k3s import clock
from k3sagentd.k3s.facts import read_facts
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.k3s.probe import Passwords, probe
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

RESULT_POLL_S = 0.25
"""Only while an order is under way."""
PROBE_BUSY_S = 1.0
PROBE_READY_S = 60.0
PROBED = (NodePhase.INITIALISING, NodePhase.JOINING, NodePhase.READY, NodePhase.FAILED)


class Drive:
    """Follows what root does, and looks at the K3s that runs."""

    def __init__(
        self,
        engine: Engine,
        paths: Paths,
        node_passwords: Sequence[str],
        clocks: Callable[[], Mapping[str, float]],
    ) -> None:
        self._engine = engine
        self._paths = paths
        self._passwords = Passwords(node_passwords)
        self._clocks = clocks
        self._wake = asyncio.Event()
        self._orders = 0
        self._told: Set[tuple[str, float]] = frozenset()

    def order(self, order: Order) -> None:
        """Write an order; a disk of memory that takes nothing is retried with the next attempt."""
        self._orders += 1
        try:
            clock.write(self._paths, self._clocks())
            write_order(self._paths, order)
        except OSError as error:
            log.error("cannot write %s: %s", self._paths.order, error.strerror)
        self._wake.set()

    def wake(self) -> None:
        """Something changed: look whether there is work."""
        self._wake.set()

    async def run(self) -> None:
        """Poll while there is something to poll, else sleep until woken."""
        next_probe_s, phase = 0.0, self._engine.node.phase
        while True:
            self._wake.clear()
            node = self._engine.node
            if node.phase is not phase:
                next_probe_s, phase = 0.0, node.phase
            running = node.drive.outcome is Outcome.RUNNING and node.drive.order is not None
            if running:
                await self._look_for_result()
            probing = node.phase in PROBED and node.drive.order is not None
            if node.phase is NodePhase.JOINING and node.facts is not None:
                probing = True  # after a restart of the daemon K3s may be running already
            if probing and time.monotonic() >= next_probe_s:
                await self._probe()
                phase = self._engine.node.phase
                ready = phase is NodePhase.READY
                next_probe_s = time.monotonic() + (PROBE_READY_S if ready else PROBE_BUSY_S)
            pause_s = RESULT_POLL_S if running else None
            if probing:
                left_s = max(0.05, next_probe_s - time.monotonic())
                pause_s = min(left_s, pause_s or left_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    async def _look_for_result(self) -> None:
        try:
            if (clocks := self._clocks()).items() != self._told:
                self._told = clocks.items()
                clock.write(self._paths, clocks)
            result = read_result(self._paths)
        except (DataError, OSError) as error:
            log.warning("cannot read %s: %s", self._paths.result, error)
            return
        drive = self._engine.node.drive
        if result is None or result.order != drive.order or result == drive.result:
            return
        if result.outcome is not Outcome.RUNNING:
            # What is on the disk now goes before what follows from the order's end.
            await self.look_at_facts()
        await self._engine.carry_out(ResultRead(now_s=time.monotonic(), result=result))

    async def look_at_facts(self) -> bool:
        """Feed the facts that root wrote; False while there are none."""
        try:
            found = read_facts(self._paths)
        except (DataError, OSError) as error:
            log.warning("cannot read %s: %s", self._paths.facts, error)
            return False
        if found is None:
            return False
        await self._engine.carry_out(FactsRead(now_s=time.monotonic(), facts=found.facts))
        return True

    async def _probe(self) -> None:
        node = self._engine.node
        role = k3s_role(node)
        if role is None:
            return
        orders = self._orders
        state = await probe(role, self._passwords, node.seal.ca_hash if node.seal else None)
        order = self._engine.node.drive.order
        on_its_way_out = order and order.action in (Action.STAND_DOWN, Action.STEP_DOWN)
        stale = orders != self._orders or on_its_way_out
        if not stale and state != self._engine.node.k3s:
            await self._engine.carry_out(K3sProbed(now_s=time.monotonic(), state=state))
