# SPDX-License-Identifier: Apache-2.0
"""Who is a member of the etcd cluster, as K3s has it (pkg/etcd/etcd.go): names, joining, removal,
reset."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from k3sagentd.lab.standin.etcd import TOMBSTONE, Etcd, EtcdError
from k3sagentd.lab.standin.options import fatal, log

STEP_S = 0.5
TEST_S = 5.0
"""K3s tests its membership that often (pkg/executor/embed), and says each time what is wrong."""
LEARNER_STALL_S = 300.0
"""pkg/etcd/etcd.go: learnerMaxStallTime."""


class DuplicateNameError(Exception):
    """A member of that node name is there already."""


class Members:
    """This member, and the others as it sees them."""

    def __init__(self, etcd: Etcd, node_name: str, node_ip: str) -> None:
        self.etcd = etcd
        self._directory = etcd.directory
        self._node_name = node_name
        self._node_ip = node_ip
        self._reset_flag = etcd.directory.parent / "reset-flag"
        self._learners: dict[str, float] = {}
        """When each learner was first seen here."""

    # --- what is on the disk ----------------------------------------------------------------

    @property
    def initialised(self) -> bool:
        """Whether etcd was here before; then nothing else counts (K3S.md 1)."""
        return (self._directory / "member/wal").is_dir()

    @property
    def name(self) -> str:
        """The node's name with 8 hex of its own, kept beside the data."""
        path = self._directory / "name"
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(f"{self._node_name}-{secrets.token_hex(4)}")
        return path.read_text()

    def forget_name(self) -> None:
        """The next start takes another."""
        (self._directory / "name").unlink(missing_ok=True)

    def bury(self) -> bool:
        """Move the data of a member that was removed aside; whether it was one."""
        if not (self._directory / TOMBSTONE).exists():
            return False
        log.info("tombstone file has been detected, removing data dir to rejoin the cluster")
        self._directory.rename(
            self._directory.with_name(f"{self._directory.name}-backup-{int(time.time())}")
        )
        return True

    def finish_reset(self) -> bool:
        """Remove the flag of a reset that was done; whether there was one."""
        found = self._reset_flag.exists()
        self._reset_flag.unlink(missing_ok=True)
        return found

    # --- starting ---------------------------------------------------------------------------

    def found(self) -> None:
        """Start as the first member of a new cluster."""
        self.etcd.start(self.name, f"{self.name}={self.etcd.peer_url}", new=True)

    def resume(self) -> None:
        """Start as the member that it was."""
        self.etcd.start(self.name, None, new=False)

    def join(self, cluster: list[str]) -> None:
        """Start as a member that was just added to ``cluster``."""
        text = ",".join([*cluster, f"{self.name}={self.etcd.peer_url}"])
        self.etcd.start(self.name, text, new=False)

    async def until_member(self) -> None:
        """Until this is a voting member of a cluster that has quorum, however long that takes.

        One whose address is not the one in its peer URL stays here for ever (K3S.md 8).
        """
        said, said_s = "", 0.0
        while True:
            self.etcd.check_alive()
            try:
                wrong = self._wrong(await self.etcd.members())
                if wrong is None:
                    await self.etcd.call("kv/range", {"key": "AA=="})
                    return
            except EtcdError as error:
                wrong = str(error)
            if wrong != said or time.monotonic() - said_s >= TEST_S:
                log.info("Failed to test etcd connection: %s", wrong)
                said, said_s = wrong, time.monotonic()
            await asyncio.sleep(STEP_S)

    def _wrong(self, members: list[dict[str, Any]]) -> str | None:
        found = []
        for each in members:
            if self.etcd.peer_url in each["peerURLs"] and each.get("name") == self.name:
                return None
            found.append(f"{each.get('name', '')}={each['peerURLs'][0]}")
            if self.etcd.peer_url in each["peerURLs"] and not each.get("name"):
                raise EtcdError("this member is not published yet")
        return (
            f"this server is a not a member of the etcd cluster. Found [{' '.join(found)}], "
            f"expect: {self.name}={self._node_ip}"
        )

    async def reset(self) -> None:
        """Become the only member, at the address of now; then K3s ends."""
        if self._reset_flag.exists():
            fatal(
                "start managed database: Managed etcd cluster membership was previously reset, "
                "please remove the cluster-reset flag and start k3s normally. If you need to "
                "perform another cluster reset, you must first manually delete the "
                f"{self._reset_flag} file"
            )
        self.forget_name()
        name = self.name
        self._reset_flag.write_bytes(b"")
        self.etcd.start(name, f"{name}={self.etcd.peer_url}", new=True, force_new=True)
        while True:
            self.etcd.check_alive()
            try:
                members = await self.etcd.members()
                if self._wrong(members) is None and len(members) == 1:
                    break
                if len(members) == 1:
                    update = {"ID": members[0]["ID"], "peerURLs": [self.etcd.peer_url]}
                    await self.etcd.call("cluster/member/update", update)
            except EtcdError as error:
                log.info("failed to update peer url: %s", error)
            await asyncio.sleep(STEP_S)
        self.etcd.stop()
        await self.etcd.close()
        log.info(
            "Managed etcd cluster membership has been reset, restart without --cluster-reset flag "
            "now. Backup and delete ${datadir}/server/db on each peer etcd server and rejoin the "
            "nodes"
        )

    # --- the others -------------------------------------------------------------------------

    async def add(self, node: str, name: str, peer_url: str) -> list[str]:
        """Add a learner, unless it was; returns etcd's initial cluster, of those before it."""
        members = await self.etcd.members()
        ours = [
            m for m in members if m["peerURLs"] == [peer_url] and m.get("name", "") in ("", name)
        ]
        for each in members:
            other = each.get("name", "")
            end = other.rfind("-")
            if each not in ours and (other[:end] if end > 1 else other) == node:
                raise DuplicateNameError
        if not ours:
            await self.etcd.call("cluster/member/add", {"peerURLs": [peer_url], "isLearner": True})
        return [
            f"{m['name']}={m['peerURLs'][0]}" for m in members if m.get("name") and m not in ours
        ]

    async def remove(self, name: str, address: str) -> None:
        """Remove the member that has this name and this address, if there is one."""
        for each in await self.etcd.members():
            hosts = [urlsplit(url).hostname for url in each["peerURLs"]]
            if each.get("name") == name and address in hosts:
                log.info("Removing name=%s id=%s address=%s from etcd", name, each["ID"], address)
                await self.etcd.call("cluster/member/remove", {"ID": each["ID"]})

    async def promote(self) -> None:
        """As the leader: make voters of learners that caught up; evict one that does not."""
        learners = [m for m in await self.etcd.members() if m.get("isLearner")]
        now_s = time.monotonic()
        self._learners = {m["ID"]: self._learners.get(m["ID"], now_s) for m in learners}
        for each in learners:
            try:
                await self.etcd.call("cluster/member/promote", {"ID": each["ID"]})
                log.info("Promoted learner %s", each.get("name"))
            except EtcdError as error:
                log.info("Unable to promote learner %s: %s", each.get("name"), error)
                if now_s - self._learners[each["ID"]] > LEARNER_STALL_S:
                    await self.etcd.call("cluster/member/remove", {"ID": each["ID"]})
                    log.warning("Removed learner %s from etcd cluster", each.get("name"))


def etcd_directory(data: Path) -> Path:
    """Where K3s has etcd's data."""
    return data / "db/etcd"
