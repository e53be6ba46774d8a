# SPDX-License-Identifier: Apache-2.0
"""What the stand-in is told: K3s's configuration, merged as K3s does, and knobs for tests."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from k3sagentd.k3s.flags import SHARED, canonical
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import merge

log = logging.getLogger("k3s")
KNOBS = Path("/etc/k3s-standin.yaml")
ENVIRONMENT = {
    "K3S_AGENT_TOKEN": "agent-token",
    "K3S_AGENT_TOKEN_FILE": "agent-token-file",
    "K3S_NODE_NAME": "node-name",
    "K3S_TOKEN": "token",
    "K3S_TOKEN_FILE": "token-file",
    "K3S_URL": "server",
}
"""The variables that K3s's units set, with the option that each stands for."""
BOOLEANS = frozenset({"cluster-init", "cluster-reset", "debug", "secrets-encryption"})
LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
"""Kubernetes, Labels and Selectors: syntax."""


def fatal(message: str) -> NoReturn:
    """End as K3s does, wherever it is: one line, exit 1."""
    log.critical("%s", message)
    logging.shutdown()
    os._exit(1)


@dataclass(frozen=True, slots=True)
class Knobs:
    """How a test wants the stand-in to behave."""

    start_delay_s: float = 0.0
    """Before it answers anything but ``starting``."""
    promote_s: float = 15.0
    """The leader's tick for learners (K3S.md 4)."""
    fail: str | None = None
    """Ends each start with this message."""
    node_grace_s: float = 40.0
    """A Node that was not heard for longer is Unknown (kube-controller-manager,
    ``--node-monitor-grace-period``)."""
    request_s: float = 0.0
    """How long a server works on each request to a node path."""
    reads: int = 20
    """Requests that a server reads for at a time on node paths, and half as many that write
    (pkg/server/handlers/router.go)."""
    version: str = "v1.33.4+k3s1"
    """The release that it says it is. Before v1.22.2 SQLite is not converted (K3S.md 1)."""
    tombstone: bool = True
    """A removed member leaves a tombstone and comes back at its next start, as the source has it;
    without, it ends at every start, as some releases do."""


def knobs() -> Knobs:
    """The knobs, where a test set some."""
    if not KNOBS.exists():
        return Knobs()
    return Knobs(**yaml.safe_load(KNOBS.read_text()))


@dataclass(frozen=True, slots=True)
class Options:
    """K3s's options, as far as they matter here."""

    values: Mapping[str, Any]

    @property
    def cluster_init(self) -> bool:
        """``cluster-init``."""
        return self.values.get("cluster-init") is True

    @property
    def cluster_reset(self) -> bool:
        """``cluster-reset``."""
        return self.values.get("cluster-reset") is True

    @property
    def server(self) -> str | None:
        """``server``."""
        return self.values.get("server")

    @property
    def node_name(self) -> str:
        """``node-name``, else the hostname; with the node's id for ``with-node-id`` (K3S.md 5)."""
        name = str(self.values.get("node-name") or Path("/etc/hostname").read_text()).strip()
        if self.values.get("with-node-id") is True:
            name = f"{name}-{_kept('/etc/rancher/node/id', 4)}"
        return name.lower()

    @property
    def token(self) -> str | None:
        """``token-file`` beats ``token`` (K3S.md 5)."""
        return self._secret("token")

    @property
    def agent_token(self) -> str | None:
        """``agent-token-file`` beats ``agent-token``."""
        return self._secret("agent-token")

    def _secret(self, key: str) -> str | None:
        if file := self.values.get(f"{key}-file"):
            try:
                return Path(file).read_text().strip()
            except OSError as error:
                fatal(f"{key}-file: {error}")
        return self.values.get(key)

    @property
    def node_ip(self) -> str:
        """The first ``node-ip``, else the address towards the default route."""
        found = self.list_of("node-ip")
        if found:
            return found[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing; chooses the source address
            except OSError:
                fatal("no default routes found")
            return str(probe.getsockname()[0])

    @property
    def sans(self) -> list[str]:
        """``tls-san``."""
        return self.list_of("tls-san")

    @property
    def labels(self) -> dict[str, str]:
        """``node-label``; what Kubernetes does not take as a label ends the start."""
        found = {}
        for text in self.list_of("node-label"):
            key, _, value = text.partition("=")
            if not LABEL.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                fatal(f"kubelet exited: invalid node label {text!r}")
            domain = key.rpartition("/")[0]
            if domain.endswith(("kubernetes.io", "k8s.io")):
                fatal(f"kubelet exited: unknown {domain!r} labels specified: {key}")
            found[key] = value
        return found

    @property
    def critical(self) -> dict[str, str]:
        """The flags that servers must share."""
        return {key: canonical(v) for key, v in sorted(self.values.items()) if key in SHARED}

    def list_of(self, key: str) -> list[str]:
        """An option that may stand several times, or as one text with commas."""
        found = self.values.get(key)
        items = found if isinstance(found, list) else [] if found is None else [found]
        return [part.strip() for item in items for part in str(item).split(",") if part.strip()]


def load(arguments: Sequence[str] = ()) -> Options:
    """This machine's configuration: command line over files over environment (K3S.md 5)."""
    values = {key: os.environ[name] for name, key in ENVIRONMENT.items() if os.environ.get(name)}
    values.update(merge(Paths().k3s_config).values)
    values.update(_flags(list(arguments)))
    return Options(values)


def _flags(arguments: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while arguments:
        key, equals, value = arguments.pop(0).partition("=")
        if not key.startswith("--"):
            fatal(f"Error: flag provided but not defined: {key}")
        name = key.removeprefix("--")
        if name in BOOLEANS or name.startswith("disable-"):
            found[name] = value != "false"
        elif not equals and not arguments:
            fatal(f"Error: flag needs an argument: {key}")
        else:
            found[name] = value if equals else arguments.pop(0)
    return found


def password_of(token: str) -> str:
    """The password in a token of either form."""
    if token.startswith("K10"):
        return token.partition("::")[2].partition(":")[2]
    return token


def wrong_hash(token: str, found: str) -> str | None:
    """What is wrong with a token of the secure form, which is bound to a CA (K3S.md 2)."""
    if not token.startswith("K10"):
        return None
    wanted = token[3:].partition("::")[0]
    if len(wanted) != 64:
        return "invalid token CA hash length"
    if wanted != found:
        return f"token CA hash does not match the Cluster CA certificate hash: {wanted} != {found}"
    return None


def node_password() -> str:
    """The node's own password, made once (K3S.md 7)."""
    return _kept("/etc/rancher/node/password", 16)


def _kept(name: str, length_bytes: int) -> str:
    path = Path(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(length_bytes) + "\n")
        path.chmod(0o600)
    return path.read_text().strip()
