# SPDX-License-Identifier: Apache-2.0
"""A real etcd member: started as a child, spoken to through its HTTP gateway."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import signal
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

from k3sagentd.lab.standin.options import fatal, log

CLIENT = "http://127.0.0.1:2379"
TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1


class EtcdError(Exception):
    """etcd said no, or nothing."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Etcd:
    """One member and the cluster behind it."""

    def __init__(self, directory: Path, node_ip: str) -> None:
        self._directory = directory
        self._peer_url = f"http://{node_ip}:2380"
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def peer_url(self) -> str:
        """Where other members reach this one."""
        return self._peer_url

    def start(self, name: str, cluster: str | None, *, new: bool) -> None:
        """Start the member; ``cluster`` is etcd's initial cluster, None for one that exists."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [
            "etcd",
            f"--name={name}",
            f"--data-dir={self._directory}",
            f"--listen-client-urls={CLIENT}",
            f"--advertise-client-urls={self._peer_url.replace('2380', '2379')}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            "--log-level=warn",
            "--heartbeat-interval=500",
            "--election-timeout=5000",
        ]
        if cluster is not None:
            command += [
                f"--initial-cluster={cluster}",
                f"--initial-cluster-state={'new' if new else 'existing'}",
            ]
        self._process = subprocess.Popen(command, preexec_fn=_die_with_parent)

    def check_alive(self) -> None:
        """End when etcd ended: K3s is one process with it."""
        if self._process is not None and self._process.poll() is not None:
            fatal(f"etcd ended with {self._process.returncode}")

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to the gateway; raises EtcdError."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout)
        try:
            async with self._session.post(f"{CLIENT}/v3/{path}", json=body) as response:
                answer: dict[str, Any] = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise EtcdError(type(error).__name__) from error
        if response.status != 200:
            raise EtcdError(str(answer.get("error") or answer.get("message")))
        return answer

    async def wait_until_up(self) -> None:
        """Until a linearizable read goes through, however long that takes."""
        while True:
            self.check_alive()
            try:
                await self.get("/standin/up")
                return
            except EtcdError as error:
                log.info("waiting for etcd: %s", error)
                await asyncio.sleep(0.5)

    async def get(self, key: str) -> str | None:
        """One value, by a linearizable read."""
        answer = await self.call("kv/range", {"key": _b64(key)})
        found = answer.get("kvs")
        return base64.b64decode(found[0]["value"]).decode() if found else None

    async def values(self, prefix: str) -> list[str]:
        """All values below ``prefix``."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = await self.call("kv/range", {"key": _b64(prefix), "range_end": _b64(end)})
        return [base64.b64decode(each["value"]).decode() for each in answer.get("kvs", [])]

    async def put(self, key: str, value: str) -> None:
        """Write one value."""
        await self.call("kv/put", {"key": _b64(key), "value": _b64(value)})

    async def members(self) -> list[dict[str, Any]]:
        """The member list."""
        found: list[dict[str, Any]] = (await self.call("cluster/member/list", {}))["members"]
        return found

    async def add_learner(self, peer_url: str) -> str:
        """Add a learner; returns the new member's id."""
        body = {"peerURLs": [peer_url], "isLearner": True}
        return str((await self.call("cluster/member/add", body))["member"]["ID"])

    async def promote(self) -> None:
        """As the leader: make voters of learners that caught up."""
        status = await self.call("maintenance/status", {})
        if status.get("leader") != status["header"]["member_id"]:
            return
        for member in await self.members():
            if member.get("isLearner"):
                try:
                    await self.call("cluster/member/promote", {"ID": member["ID"]})
                    log.info("promoted %s", member.get("name"))
                except EtcdError as error:
                    log.info("learner %s is not ready: %s", member.get("name"), error)
