# SPDX-License-Identifier: Apache-2.0
"""What the cluster says of itself, asked at one of its servers: etcd's members, Kubernetes' Nodes.

Asked past the daemon, so that nothing that it believes is taken for the truth.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from k3sagentd.errors import MachineError
from k3sagentd.lab import network, site
from tests.lab.conftest import Bench

YES = "--yes"
POLL_S = 0.3
TIMEOUT_S = 60.0
CARD = ("etc/rancher", "var/lib/rancher", "var/lib/k3sagentd", "var/lib/k3sagentd-apply")
"""What a new image has not, beside ``/etc/k3sagentd``."""
DAEMON = ("-m", "k3sagentd", "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member of etcd; one that never started has no name."""

    name: str
    address: str
    voter: bool


def k3sagentd(lab: Bench, name: str, *command: str) -> str:
    """A command in a machine; it must succeed."""
    return lab.inside(name, sys.executable, "-m", "k3sagentd", *command)


def refused(lab: Bench, name: str, *command: str) -> str:
    """What a command in a machine says that must fail."""
    line = " ".join([sys.executable, "-m", "k3sagentd", *command])
    said = lab.run("exec", name, "--", "sh", "-c", f"{line} 2>&1 && echo DONE", check=False)
    assert "DONE" not in said, said
    return said


def files(name: str) -> Path:
    """A machine's files, as seen from here."""
    return site.load().machine(name)


def configure(name: str, **settings: object) -> None:
    """Change a machine's configuration; it counts from the daemon's next start."""
    path = files(name) / "etc/k3sagentd/config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


def wipe(name: str) -> None:
    """A new image on the card of a machine that is off."""
    for each in CARD:
        shutil.rmtree(files(name) / each)
        (files(name) / each).mkdir()


def processes(name: str, *words: str) -> list[int]:
    """Processes of a machine, by its PID namespace, whose command line has ``words``."""
    first = site.load().pid(name)
    assert first is not None, f"{name} is off"
    home = Path(f"/proc/{first}/ns/pid").readlink()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/pid").readlink() == home:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                if line[1 : 1 + len(words)] == [word.encode() for word in words]:
                    found.append(int(entry.name))
    return found


def end(name: str, *words: str, by: signal.Signals = signal.SIGTERM) -> None:
    """End a process of a machine, and wait until it is gone."""
    (pid,) = processes(name, *words)
    started = site.start_time(pid)
    os.kill(pid, by)
    deadline = time.monotonic() + TIMEOUT_S
    while site.start_time(pid) == started:
        assert time.monotonic() < deadline, f"{words} does not end on {name}"
        time.sleep(0.05)


def leaves(lab: Bench, name: str) -> None:
    """``k3sagentd leave``, again where a Node that was not ready for a moment had it refused."""
    command = [sys.executable, "-m", "k3sagentd", "leave", "--yes"]
    left = site.load().machine(name) / "etc/k3sagentd/left"

    def has_left(views: dict[str, dict]) -> bool:
        lab.run("exec", name, "--", *command, check=False)
        return left.exists()

    lab.until(has_left)


def restart_daemon(lab: Bench, name: str) -> None:
    """``systemctl restart k3sagentd``; returns once it is in the cluster (again).

    Killed: who ends it in order wants it to stay away.
    """
    end(name, *DAEMON, by=signal.SIGKILL)
    k3sagentd(lab, name, "wait", "--for", "joined", "--timeout", "120s")


# --- etcd -----------------------------------------------------------------------------------


def members(name: str) -> list[Member]:
    """The member list as the member on ``name`` knows it."""
    return [
        Member(
            name=each.get("name", ""),
            address=str(urlsplit(each["peerURLs"][0]).hostname),
            voter=not each.get("isLearner"),
        )
        for each in _etcd(name, "cluster/member/list")["members"]
    ]


def voters(name: str) -> list[str]:
    """The addresses of the voting members that have started."""
    return sorted(each.address for each in members(name) if each.voter and each.name)


def cluster_id(name: str) -> str:
    """The id of the etcd cluster that the member on ``name`` is in."""
    found: str = _etcd(name, "cluster/member/list")["header"]["cluster_id"]
    return found


def has_password(name: str, node: str) -> bool:
    """Whether the cluster keeps a password for the node's name (K3S.md 7)."""
    key = f"/registry/secrets/kube-system/{node}.node-password.k3s"
    return bool(_etcd(name, "kv/range", key=base64.b64encode(key.encode()).decode()).get("kvs"))


def _etcd(name: str, path: str, **body: str) -> dict[str, Any]:
    return _curl(name, "-d", json.dumps(body), f"http://127.0.0.1:2379/v3/{path}")


def _curl(name: str, *arguments: str) -> dict[str, Any]:
    enter = ("ip", "netns", "exec", network.namespace(name))
    found: dict[str, Any] = json.loads(network.run(*enter, "curl", "-sSf", "-m", "10", *arguments))
    return found


class QuorumWatch(threading.Thread):
    """Looks at the member list all the time, and asserts at the end that a quorum of it was on, and
    that there were never fewer than ``fewest`` voters."""

    def __init__(self, survivor: str, *, fewest: int = 1) -> None:
        super().__init__(daemon=True)
        self._survivor = survivor
        self._fewest = fewest
        self._end = threading.Event()
        self._bad: list[str] = []
        self._looks = 0

    def run(self) -> None:
        """Until it is told to end."""
        lab = site.load()
        at = {network.address_of(number): each for each, number in lab.machines.items()}
        while not self._end.wait(POLL_S):
            try:
                found = [each for each in members(self._survivor) if each.voter]
            except MachineError:
                continue  # it starts
            on = [each for each in found if lab.pid(at[each.address]) is not None]
            self._looks += 1
            if len(on) <= len(found) // 2 or len(found) < self._fewest:
                self._bad.append(f"{len(on)} of {[each.name for each in found]}")

    def __enter__(self) -> "QuorumWatch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()
        assert not self._bad, self._bad
        assert self._looks > 2, "it was not watched"


# --- Kubernetes -----------------------------------------------------------------------------


def nodes(name: str) -> dict[str, dict[str, Any]]:
    """The Node objects, as the server on ``name`` has them, by name, once it can tell."""
    tls = files(name) / "var/lib/rancher/k3s/server/tls"
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            found = _curl(
                name,
                *("--cacert", f"{tls}/server-ca.crt"),
                *("--cert", f"{tls}/client-admin.crt", "--key", f"{tls}/client-admin.key"),
                "https://127.0.0.1:6443/api/v1/nodes",
            )
            return {each["metadata"]["name"]: each for each in found["items"]}
        except MachineError:
            # etcd elects another leader.
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def uid(name: str, node: str) -> str:
    """The uid of a Node: another one once it was made anew."""
    found: str = nodes(name)[node]["metadata"]["uid"]
    return found


# --- what the machines say ------------------------------------------------------------------


def servers(views: dict[str, dict]) -> list[str]:
    """The machines that are ready as servers."""
    return _ready(views, "server")


def agents(views: dict[str, dict]) -> list[str]:
    """The machines that are ready as agents."""
    return _ready(views, "agent")


def _ready(views: dict[str, dict], role: str) -> list[str]:
    return [
        name
        for name, view in views.items()
        if view.get("node", {}).get("phase") == "ready" and view["node"]["role"] == role
    ]


def init_machine(views: dict[str, dict]) -> str:
    """The machine that started the cluster."""
    init = next(iter(views.values()))["site"]["init_node"]
    return next(name for name, view in views.items() if view["node"]["id"] == init)


def said(views: dict[str, dict], name: str) -> str:
    """All that a machine's status says to a person: what it waits for, and its notes."""
    node = views[name]["node"]
    return "; ".join(filter(None, [node["waiting_for"], *node["notes"]]))


def events(views: dict[str, dict], name: str) -> str:
    """What happened on a machine since its daemon started."""
    return "\n".join(each["text"] for each in views[name]["events"])
