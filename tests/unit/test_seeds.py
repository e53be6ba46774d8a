# SPDX-License-Identifier: Apache-2.0
"""Peers by name: what is said where the name cannot be resolved."""

import asyncio
import logging
import socket

import pytest

from k3sagentd.discovery import seeds


def test_a_name_that_cannot_be_resolved_names_what_may_bar_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def follow() -> None:
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()

        async def nobody_answers(*_: object, **__: object) -> list[object]:
            asked.set()
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        monkeypatch.setattr(loop, "getaddrinfo", nobody_answers)
        task = asyncio.create_task(seeds.follow("k3s.example.net", 6440, print))
        await asked.wait()
        await asyncio.sleep(0)
        task.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(follow())
    assert "seed k3s.example.net cannot be resolved: Temporary failure" in caplog.text
    assert "IPAddressAllow=" in caplog.text
