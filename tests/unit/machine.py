# SPDX-License-Identifier: Apache-2.0
"""A root directory that looks like an installed server, with a systemctl and a k3s of its own."""

import asyncio
import hashlib
import json
import threading
from pathlib import Path

from k3sagentd.control import ControlServer
from k3sagentd.core.words import NodeId
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.k3s import dropin
from k3sagentd.paths import Paths

OLD, NEW = "10.0.0.1", "10.0.0.9"
AT = Attachment("eth0", 2, NEW)
ME = NodeId("a" * 32)
SYSTEMCTL = """#!/bin/sh
cd {root}
case "$*" in is-active*) ;; *) echo "$@" >> said ;; esac
case "$*" in
"start --no-block k3s.service")
    touch active
    mkdir -p var/lib/rancher/k3s/server/db/etcd/member/wal ;;
"disable --now k3s.service") rm -f active ;;
is-active*) [ -e active ] && echo active ;;
esac
"""
K3S = """#!/bin/sh
cd {root}
echo "k3s $@" >> said
[ -e active ] && { echo "it runs"; exit 1; }
db=var/lib/rancher/k3s/server/db
grep -q '^server:' etc/rancher/k3s/config.yaml.d/*.yaml && { echo "server is set"; exit 1; }
[ -e $db/reset-flag ] && { echo "was previously reset"; exit 1; }
touch $db/reset-flag
"""
UNINSTALL = """#!/bin/sh
cd {root}
echo uninstall >> said
rm -rf var/lib/rancher/k3s etc/rancher/k3s etc/systemd/system/k3s.service
rm usr/local/bin/k3s-uninstall.sh
"""


class Server:
    """A server of a sealed site, as it is on the disk."""

    def __init__(self, root: Path, *, method: str = "script") -> None:
        self.paths = paths = Paths(root)
        for each in (paths.config, paths.dropin, paths.keepalived, paths.installed):
            each.parent.mkdir(parents=True)
        for name in ("bin", "usr/local/bin", "etc/systemd/system", "run/systemd/system"):
            (root / name).mkdir(parents=True)
        for directory in (paths.run, paths.root_run, paths.state, root / "etc/rancher/node"):
            directory.mkdir(parents=True)
        paths.config.write_text(
            f"nodes: 3\ninstall:\n  method: {method}\n  binary: {root}/bin/k3s\n"
        )
        paths.token.write_text(hashlib.sha256(b"t").hexdigest())
        paths.token.chmod(0o600)
        (root / "etc/rancher/node/password").write_text("p")
        (root / "etc/systemd/system/k3s.service").touch()
        (root / "said").touch()
        (root / "active").touch()
        self._program("bin/systemctl", SYSTEMCTL)
        self._program("bin/k3s", K3S)
        if method == "script":
            self._program("usr/local/bin/k3s-uninstall.sh", UNINSTALL)
        paths.installed.write_text("{}")
        for name in ("node.key", "log.json"):
            (paths.state / name).write_text(name)
        (paths.state / "moved-1").mkdir()
        (paths.state / "moved-1/node.key").write_text("older")
        (paths.k3s_data / "server/db/etcd/member/wal").mkdir(parents=True)
        (paths.k3s_data / "server/db/etcd/name").write_text("n1-12345678")
        self.tell(cluster_init=True)
        paths.k3s_token.write_text(paths.token.read_text() + "\n")

    def tell(self, *, node_ip: str = OLD, cluster_init: bool = False) -> None:
        """Write the drop-in."""
        values = {
            "node-ip": node_ip,
            "node-name": "n1",
            "tls-san": [node_ip, "k3s.example"],
            "flannel-iface": "eth0",
            "token-file": str(self.paths.k3s_token),
        }
        values |= {"cluster-init": True} if cluster_init else {"server": "https://10.0.0.2:6443"}
        self.paths.dropin.write_bytes(dropin.render(values))

    def _program(self, name: str, text: str) -> None:
        path = self.paths.root / name
        path.write_text(text.replace("{root}", str(self.paths.root)))
        path.chmod(0o755)

    @property
    def said(self) -> list[str]:
        """What systemctl, k3s and the uninstall script were asked for."""
        return (self.paths.root / "said").read_text().splitlines()

    def files(self) -> dict[str, str]:
        """Every file, but what is gone at the next boot and what the test itself put there."""
        root = self.paths.root
        found = {}
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if path.is_file() and not name.startswith(("run/", "bin/", "said")):
                found[name] = path.read_text().replace(str(root), "")
        return found


def row(
    number: int,
    *,
    phase: str = "joining",
    age_s: float = 0.0,
    role: str = "server",
    moved: bool = False,
    member: bool | None = None,
) -> dict:
    """A line of the daemon's status."""
    return {
        "id": f"{number:x}" * 32,
        "name": f"n{number}",
        "address": f"127.0.0.{number}",
        "role": role,
        "phase": phase,
        "age_s": age_s,
        "moved": moved,
        "member": role == "server" if member is None else member,
    }


def status(*others: dict, servers: int = 3, roster: list[str] | None = None) -> dict:
    """What the daemon of the server says, which is n1."""
    own = row(1) | {"id": ME, "address": NEW}
    site = {"phase": "sealed", "servers": servers}
    if roster is not None:
        site["roster"] = roster
    return json.loads(
        json.dumps(
            {
                "site": site,
                "node": {"id": ME, "name": "n1", "address": NEW, "leaving": None},
                "nodes": [own, *others],
            }
        )
    )


class Daemon:
    """Answers at the control socket, and notes what the machine was like then."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.view = status(row(2, moved=True))
        self.rereads = 0
        self.errors: dict[str, str] = {}
        self.asked: list[tuple[str, bool]] = []
        self.answers_after_s = 0.0

    async def status(self, after: int, wait_s: float) -> dict:
        return {"rev": 1, "status": self.view}

    def registration(self) -> None:
        return None

    async def force(self) -> str | None:
        return "this node sees two clusters"

    async def reread(self) -> str | None:
        self.rereads += 1
        return self.errors.get("reread")

    async def leave(self, step: str) -> str | None:
        self.asked.append((step, (self._server.paths.root / "active").exists()))
        await asyncio.sleep(self.answers_after_s)
        return self.errors.get(step)

    def __enter__(self) -> "Daemon":
        self._loop = asyncio.new_event_loop()
        self._control = ControlServer(self._server.paths.control, self)
        self._loop.run_until_complete(self._control.start())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._control.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
