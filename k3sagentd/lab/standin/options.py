# SPDX-License-Identifier: Apache-2.0
"""What the stand-in is told: K3s's configuration, merged as K3s does, and knobs for tests."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from k3sagentd.k3s.flags import SHARED, canonical
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import merge

log = logging.getLogger("k3s")
KNOBS = Path("/etc/k3s-standin.yaml")


def fatal(message: str) -> NoReturn:
    """End as K3s does: one line, exit 1."""
    log.critical("%s", message)
    sys.exit(1)


@dataclass(frozen=True, slots=True)
class Knobs:
    """How a test wants the stand-in to behave."""

    start_delay_s: float = 0.0
    """Before it answers anything but ``starting``."""
    promote_s: float = 15.0
    """The leader's tick for learners (K3S.md 4)."""
    version: str = "v1.33.4+k3s1"
    """What it says it is. Before v1.22.2 it does not convert SQLite (K3S.md 1)."""
    fail: str | None = None
    """Ends each start with this message."""


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
    def server(self) -> str | None:
        """``server``."""
        return self.values.get("server")

    @property
    def node_name(self) -> str:
        """``node-name``, else the hostname."""
        return str(self.values.get("node-name") or Path("/etc/hostname").read_text().strip())

    @property
    def token(self) -> str | None:
        """``token-file`` beats ``token`` (K3S.md 5)."""
        if file := self.values.get("token-file"):
            try:
                return Path(file).read_text().strip()
            except OSError as error:
                fatal(f"token-file: {error}")
        return self.values.get("token")

    @property
    def node_ip(self) -> str:
        """The first ``node-ip``."""
        found = self.values.get("node-ip")
        first = found[0] if isinstance(found, list) else found
        if not first:
            fatal("no node-ip and no default route")
        return str(first).split(",")[0]

    @property
    def critical(self) -> dict[str, str]:
        """The flags that servers must share."""
        return {key: canonical(v) for key, v in sorted(self.values.items()) if key in SHARED}


def load() -> Options:
    """Read K3s's configuration of this machine."""
    return Options(merge(Paths().k3s_config).values)


def password_of(token: str) -> str:
    """The password in a token of either form."""
    if token.startswith("K10"):
        return token.partition("::")[2].partition(":")[2]
    return token


def check_hash(token: str, found: str) -> None:
    """The secure form is bound to a CA; anything else ends the start (K3S.md 2)."""
    if not token.startswith("K10"):
        return
    wanted = token[3:].partition("::")[0]
    if len(wanted) != 64:
        fatal("invalid token CA hash length")
    if wanted != found:
        fatal(f"token CA hash does not match the Cluster CA certificate hash: {wanted} != {found}")


def node_password() -> str:
    """The node's own password, made once (K3S.md 7)."""
    path = Path("/etc/rancher/node/password")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(16))
    return path.read_text()
