# SPDX-License-Identifier: Apache-2.0
"""A machine for root's part: its files, and a K3s that notes what it is asked."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from k3sagentd.core.k3s import Action, Order, Outcome, Result, ServerOrAgent
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import MachineError
from k3sagentd.k3s import apply as root
from k3sagentd.k3s import (
    convert,
    credentials,
    dropin,
    facts,
    make,
    ownership,
    reach,
    servers,
    spared,
)
from k3sagentd.k3s.kube import Kube, RefusedError
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.paths import Paths

SERVER, AGENT = ServerOrAgent.SERVER, ServerOrAgent.AGENT
TOKEN = hashlib.sha256(b"t").hexdigest()
CA = b"of the site"
HASH = hashlib.sha256(CA).hexdigest()
ONE, TWO = "https://10.0.0.1:6443", "https://10.0.0.2:6443"
NODE = "0123456789abcdef"
INIT = Order(action=Action.INIT, epoch=0, role=SERVER, node_name="n1", node=NODE)
JOIN = replace(INIT, action=Action.JOIN, servers=(ONE, TWO), ca_hash=HASH)
JOIN_AGENT = replace(JOIN, role=AGENT)
WAL, STATE = "server/db/etcd/member/wal", "server/db/state.db"
AS_SERVER = ("server/tls/server-ca.crt", "agent/server-ca.crt", "agent/client-kubelet.crt")
AS_AGENT = ("agent/server-ca.crt", "agent/client-kubelet.crt", "agent/images/all.tar")


class Fake:
    """A way to have K3s that notes what it is asked, with a K3s that converts as K3s does."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.did: list[str] = []
        self.role: ServerOrAgent | None = None
        self.says: str | None = "k3s version v1.33.4+k3s1 (148243c4)"
        self.converts = True

    starts_at_boot = True

    def installed(self, role: ServerOrAgent) -> bool:
        return True

    def owes_start(self, role: ServerOrAgent) -> bool:
        return False

    def owe_start(self, role: ServerOrAgent) -> None:
        pass

    def install(self, order: Order) -> None:
        self.did.append(f"install {order.role}")

    def running(self, role: ServerOrAgent | None = None) -> bool:
        return self.role is not None and role in (None, self.role)

    def start(self, role: ServerOrAgent, *, at_boot: bool = True) -> None:
        assert self.role in (None, role), "two at once"
        if self.role is not None:
            self.did.append(f"enable {role}")
            return
        self.did.append(f"start {role}" + ("" if at_boot else " as it is"))
        self.role = role
        told = self.paths.dropin.read_text() if self.paths.dropin.exists() else ""
        state = self.paths.k3s_data / STATE
        if self.converts and state.exists() and "cluster-init: true" in told:
            (self.paths.k3s_data / WAL).mkdir(parents=True)
            state.rename(state.with_name("state.db.migrated"))

    def restart(self, role: ServerOrAgent) -> None:
        self.did.append(f"restart {role}")

    def stop(self) -> None:
        self.did.append("stop")
        self.role = None

    def halt(self) -> None:
        self.did.append("halt")
        self.role = None

    def version(self) -> str | None:
        return self.says


class Machine:
    """A root directory, and apply with a fake K3s in it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = paths = Paths(path)
        self.k3s = Fake(paths)
        self.there = {ONE: HASH, TWO: HASH}
        self.at: Attachment | None = Attachment("eth0", 2, "10.0.0.7")
        for each in (paths.config.parent, paths.run, paths.dropin.parent, paths.k3s_data):
            each.mkdir(parents=True)
        paths.token.write_text(TOKEN)
        paths.token.chmod(0o600)
        self.configure()
        monkeypatch.setattr(root, "method", lambda config, paths: self.k3s)
        for module in (make, servers):
            monkeypatch.setattr(module, "attachment", lambda *_: self.at)
        monkeypatch.setattr(root, "preflight", lambda *_: iter(()))
        self.api: Kube | None = None
        monkeypatch.setattr(spared, "Kube", self._ask)
        for module in (ownership, convert):
            monkeypatch.setattr(module, "answers", self.k3s.running)
        monkeypatch.setattr(convert, "pings", self.k3s.running)
        monkeypatch.setattr(convert, "POLL_S", 0.0)
        monkeypatch.setattr(reach, "check", self._check)
        monkeypatch.setattr(credentials, "_trusting", self._check)
        monkeypatch.setattr(credentials, "takes", lambda *_: True)
        monkeypatch.setattr(credentials, "is_stuck", lambda _: False)
        monkeypatch.setattr(facts, "measure_fsync", lambda data: 1.0)

    def _ask(self, paths: Paths) -> Kube:
        if self.api is None:
            raise RefusedError("nobody listens")
        return self.api

    def _check(self, url: str, ca_hash: str | None) -> None:
        if url not in self.there:
            raise MachineError(f"{url} cannot be reached")
        if self.there[url] != ca_hash:
            raise MachineError(f"{url} has CA {self.there[url]}, but the site's is {ca_hash}")

    def configure(self, text: str = "") -> None:
        self.paths.config.write_text(f"nodes: 3\ninstall: {{method: exec}}\n{text}")

    def put(self, *names: str, ca: bytes = CA) -> None:
        for name in names:
            file = self.paths.k3s_data / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.mkdir() if name == WAL else file.write_bytes(ca)

    def ours(self, role: ServerOrAgent, **said: object) -> None:
        """An order of ours made it a running member."""
        self.paths.installed.parent.mkdir(parents=True, exist_ok=True)
        self.paths.installed.touch()
        self.paths.dropin.write_bytes(dropin.render({"server": ONE, **said}))
        self.k3s.role = role

    def apply(self, order: Order) -> Result:
        write_order(self.paths, order)
        self.k3s.did.clear()
        root.apply(self.paths)
        result = read_result(self.paths)
        assert result is not None
        return result

    def refuses(self, order: Order, why: str) -> None:
        before = self.files()
        result = self.apply(order)
        assert result.outcome is Outcome.FAILED_FOR_GOOD, result
        assert why in str(result.reason)
        assert self.files() == before
        assert not self.k3s.did

    def does(self, order: Order, *what: str) -> None:
        result = self.apply(order)
        assert result.outcome is Outcome.DONE, result
        assert self.k3s.did == list(what)

    def files(self) -> set[str]:
        tops = ("etc/rancher", "var/lib/rancher", "var/lib/k3sagentd-apply")
        return {str(f) for top in tops for f in (self.paths.root / top).rglob("*")}

    def said(self) -> dict:
        return yaml.safe_load(self.paths.dropin.read_text())
