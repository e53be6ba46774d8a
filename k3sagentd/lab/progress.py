# SPDX-License-Identifier: Apache-2.0
"""Follows every machine of the lab and tells what happens, and when each stage was reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from k3sagentd.cli.ask import reached
from k3sagentd.control import ControlClient
from k3sagentd.errors import K3sagentdError
from k3sagentd.lab.site import Lab

STAGES = ("visible", "nominated", "sealed", "complete")
WATCH_S = 30.0
RETRY_S = 0.1


class Progress:
    """What is known of each machine, and the times of the stages since the last one's start."""

    def __init__(self, lab: Lab, say: Callable[[str], None]) -> None:
        self._lab = lab
        self._say = say
        self._began_s = time.time()
        self._said: dict[str, int] = {}
        self._waits: dict[str, str | None] = {}
        self._changed = asyncio.Event()
        self._reached: dict[str, float] = {}
        self.views: dict[str, dict[str, Any]] = {}

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds from the start of the last daemon to each stage that was reached."""
        began = self._lab.started_at() or self._began_s
        return {stage: round(max(0.0, at - began), 3) for stage, at in self._reached.items()}

    async def until(self, stage: str, timeout_s: float) -> bool:
        """Follow until every machine that is on has reached ``stage``; False if time ran out."""
        tasks = [asyncio.create_task(self._follow(name)) for name in self._lab.machines]
        try:
            async with asyncio.timeout(timeout_s):
                while stage not in self._reached:
                    await self._changed.wait()
                    self._changed.clear()
                    self._note()
            return True
        except TimeoutError:
            return False
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, name: str) -> None:
        client = ControlClient(self._lab.control(name))
        after = -1
        while True:
            try:
                answer = await client.status(after, WATCH_S if after >= 0 else 0.0)
            except K3sagentdError:
                after = -1
                await asyncio.sleep(RETRY_S)
                continue
            after = answer["rev"]
            self._tell(name, answer["status"])
            self.views[name] = answer["status"]
            self._changed.set()

    def _tell(self, name: str, view: dict[str, Any]) -> None:
        elapsed_s = time.time() - self._began_s
        for event in view["events"]:
            if event["time"] >= self._began_s and event["number"] > self._said.get(name, 0):
                self._say(f"{elapsed_s:6.1f} s  {name:<8} {event['text']}")
                self._said[name] = event["number"]
        wait = view["node"]["waiting_for"]
        if wait and _stem(wait) != _stem(self._waits.get(name) or ""):
            self._say(f"{elapsed_s:6.1f} s  {name:<8} waits for {wait}")
        self._waits[name] = wait

    def _note(self) -> None:
        on = [name for name in self._lab.machines if self._lab.pid(name) is not None]
        views = [self.views[name] for name in on if name in self.views]
        if len(views) < len(on) or not views:
            return
        passed = {
            "visible": all(view["site"]["seen"] >= len(on) for view in views),
            "nominated": all(reached("nominated", view) for view in views),
            "sealed": all(reached("sealed", view) for view in views),
            "complete": all(reached("complete", view) for view in views),
        }
        for stage in STAGES:
            if passed[stage] and stage not in self._reached:
                self._reached[stage] = time.time()


def _stem(text: str) -> str:
    """The line without its figures: a countdown is no news."""
    return "".join(char for char in text if not char.isdigit())
