# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of errands: writes them for root, and hands over what became of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from k3sagentd.core.cluster import Errand, ErrandResult
from k3sagentd.errors import DataError
from k3sagentd.k3s.errand import read_result, write_errand
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

RESULT_POLL_S = 0.25
"""Only while an errand is under way."""


class Errands:
    """One errand at a time; a newer one takes the place of one that is under way."""

    def __init__(self, paths: Paths, ended: Callable[[ErrandResult], Awaitable[None]]) -> None:
        """``ended`` is called once for each errand that root has answered."""
        self._paths = paths
        self._ended = ended
        self._errand: Errand | None = None
        self._wake = asyncio.Event()
        self._said: str | None = None

    def give(self, errand: Errand) -> None:
        """Write an errand; where that fails, it is not answered, and given again by the core."""
        try:
            write_errand(self._paths, errand)
        except OSError as error:
            log.error("cannot write %s: %s", self._paths.errand, error.strerror)
            return
        self._errand = errand
        self._wake.set()

    async def run(self) -> None:
        """Poll while an errand is under way, else sleep until there is one."""
        while True:
            self._wake.clear()
            if self._errand is None:
                await self._wake.wait()
            elif (result := self._look(self._errand)) is not None:
                self._errand = None
                await self._ended(result)
            else:
                await asyncio.sleep(RESULT_POLL_S)

    def _look(self, errand: Errand) -> ErrandResult | None:
        try:
            result = read_result(self._paths)
        except (DataError, OSError) as error:
            if (said := str(error)) != self._said:
                self._said = said
                log.warning("cannot read %s: %s", self._paths.errand_result, said)
            return None
        return result if result is not None and result.errand == errand else None
