# SPDX-License-Identifier: Apache-2.0
"""``forget-token`` on the daemon's side: once this machine is an agent that is ready, keep what a
member needs without the token, ask root to wipe it, and end, so that the next run begins without.

Root decides (``k3s/forget.py``): it looks at the machine for itself.
"""

from __future__ import annotations

import asyncio
import logging

from k3sagentd import membership as memberships
from k3sagentd.config import Config
from k3sagentd.core.hello import k3s_role
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.words import NodePhase
from k3sagentd.daemon.engine import Engine
from k3sagentd.errors import TokenForgottenError
from k3sagentd.files import read_bounded, write_atomically
from k3sagentd.membership import Membership
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

LOOK_S = 60.0
POLL_S = 0.5
ANSWER_S = 60.0
"""Root has to stop looking at one thing after the other by then."""
RETRY_S = 600.0
RESULT_LIMIT_BYTES = 4096


class Forget:
    """Waits for the moment, and asks."""

    def __init__(
        self, engine: Engine, config: Config, paths: Paths, membership: Membership
    ) -> None:
        self._engine = engine
        self._config = config
        self._paths = paths
        self._membership = membership
        self._refused: str | None = None

    def notes(self) -> list[str]:
        """For ``status``: what a person should know."""
        if self._membership.tokenless:
            return [
                "this machine forgot the site's token (forget-token): it stays an agent until "
                "it is given the token again"
            ]
        if self._refused is not None:
            return [f"the token is still on this machine: {self._refused}"]
        return []

    async def run(self) -> None:
        """Return where there is nothing to forget; raises TokenForgottenError once it is done."""
        if self._membership.tokenless or not self._config.forget_token:
            return
        while True:
            revision = self._engine.revision
            if not self._due():
                await self._engine.changed(revision, LOOK_S)
                continue
            try:
                await asyncio.to_thread(self._ask)
            except OSError as error:
                self._refused = f"{error.filename} cannot be written: {error.strerror}"
            else:
                await self._await_root()
            await asyncio.sleep(RETRY_S)

    def _due(self) -> bool:
        """Whether the cluster has all that it needs of this machine's token."""
        node = self._engine.node
        if len(self._membership.site_ids) > 1:
            self._refused = "a rotation is under way; it is forgotten when that is over"
            return False
        agent = k3s_role(node) is ServerOrAgent.AGENT
        return node.seal is not None and agent and node.phase is NodePhase.READY

    def _ask(self) -> None:
        """What is kept first: root looks whether it suffices."""
        memberships.keep(self._paths.state, self._membership)
        self._paths.forget_result.unlink(missing_ok=True)
        write_atomically(self._paths.forget, b"", durable=False)

    async def _await_root(self) -> None:
        for _ in range(int(ANSWER_S / POLL_S)):
            await asyncio.sleep(POLL_S)
            if (reason := self._reason()) is None:
                continue
            if not reason:
                log.info("the token is wiped from this machine")
                raise TokenForgottenError("the token is wiped; the next run begins without it")
            if reason != self._refused:
                log.warning("the token is not wiped: %s", reason)
            self._refused = reason
            return
        self._refused = "k3sagentd-apply did not answer"

    def _reason(self) -> str | None:
        """Why root did not wipe it, empty if it did; None while it has not answered."""
        try:
            data = read_bounded(self._paths.forget_result, RESULT_LIMIT_BYTES)
        except OSError:
            return None
        return data.decode(errors="replace").strip()
