# SPDX-License-Identifier: Apache-2.0
"""A real etcd member: started as a child, spoken to through its HTTP gateway."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import aiohttp

from k3sagentd.lab.standin.options import fatal

CLIENT = "http://127.0.0.1:2379"
METRICS = "http://127.0.0.1:2381"
TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1
REMOVED = (
    b"the member has been permanently removed from the cluster",
    b"failed to find local ID",
)
"""What etcd says when it learns that it was (etcd, rafthttp.ErrMemberRemoved).

The second is a panic: who asks a member for its status just as it learns of it ends it so (etcd
issue 21966). K3s's supervisor would start it once more, to hear the first; here both are one.
"""
TOMBSTONE = "tombstone"


class EtcdError(Exception):
    """etcd said no, or nothing."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Etcd:
    """One member's process, and the gateway to it."""

    def __init__(self, directory: Path, node_ip: str, *, tombstone: bool) -> None:
        self.directory = directory
        self.peer_url = f"http://{node_ip}:2380"
        """Where other members reach this one."""
        self._tombstone = tombstone
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._removed = False
        self._session: aiohttp.ClientSession | None = None

    def start(self, name: str, cluster: str | None, *, new: bool, force_new: bool = False) -> None:
        """Start the member; ``cluster`` is etcd's initial cluster, None for one that exists."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [
            "etcd",
            f"--name={name}",
            f"--data-dir={self.directory}",
            f"--listen-client-urls={CLIENT}",
            f"--listen-metrics-urls={METRICS}",
            f"--advertise-client-urls={self.peer_url.replace('2380', '2379')}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            "--log-level=warn",
            "--heartbeat-interval=500",
            "--election-timeout=5000",
        ]
        if force_new:
            # What etcd cuts off its log then, it may have applied: whoever joins later must be
            # given the data and not the log, to have the same; so a few entries make a snapshot.
            command += ["--force-new-cluster", "--snapshot-count=1"]
        if cluster is not None:
            command += [
                f"--initial-cluster={cluster}",
                f"--initial-cluster-state={'new' if new else 'existing'}",
            ]
        self._process = subprocess.Popen(
            command, preexec_fn=_die_with_parent, stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None, "it is a pipe"
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stderr,), daemon=True
        )
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        """Hand on what etcd logs, and hear that this member was removed."""
        for line in stream:
            if any(each in line for each in REMOVED):
                self._removed = True
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()

    def check_alive(self) -> None:
        """End when etcd ended: K3s is one process with it (pkg/executor/embed/etcd)."""
        if self._process is None or self._process.poll() is None:
            return
        if self._reader is not None:
            self._reader.join()
        if self._removed and self._tombstone:
            (self.directory / TOMBSTONE).write_bytes(b"")
            fatal(
                "This node has been removed from the cluster - please restart k3s to rejoin the "
                "cluster"
            )
        fatal(f"etcd exited: {self._process.returncode}")

    def stop(self) -> None:
        """End the member in order."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    async def close(self) -> None:
        """Give up the connection to it."""
        if self._session is not None:
            await self._session.close()

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

    async def members(self) -> list[dict[str, Any]]:
        """The member list, as this member knows it."""
        found: list[dict[str, Any]] = (await self.call("cluster/member/list", {}))["members"]
        return found

    async def leads(self) -> bool:
        """Whether this member is the leader."""
        status = await self.call("maintenance/status", {})
        return bool(status.get("leader") == status["header"]["member_id"])
