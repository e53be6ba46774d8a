# SPDX-License-Identifier: Apache-2.0
"""What K3s is told on this machine by everybody: environment, files, the unit's command line.

K3s's own precedence (K3S.md 5): command line over files over environment; lists append. A unit of
ours says nothing; one that was there before us may say all.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from k3sagentd.config import Config
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.files import read_bounded
from k3sagentd.k3s import units
from k3sagentd.k3s.ca import CERTIFICATE
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import merge

FILE_LIMIT_BYTES = 256 * 1024
ENVIRONMENT = {
    "K3S_TOKEN": "token",
    "K3S_TOKEN_FILE": "token-file",
    "K3S_URL": "server",
    "K3S_NODE_NAME": "node-name",
    "K3S_DATASTORE_ENDPOINT": "datastore-endpoint",
    "K3S_CLUSTER_INIT": "cluster-init",
}
"""Those that matter here (K3s, pkg/cli/cmds/{server,agent}.go)."""
KUBELET = "system:node:"
"""Before the node's name in its kubelet's certificate (Kubernetes, Node authorization)."""


def told(paths: Paths, role: ServerOrAgent, *, ours: bool = True) -> dict[str, Any]:
    """K3s's options in ``role``, without our drop-in if not ``ours``; raises ConfigError."""
    unit = units.name_of(paths, role)
    values: dict[str, Any] = dict(_environment(paths, unit))
    values |= merge(paths.k3s_config, without=None if ours else paths.dropin).values
    for key, given in _options(units.command(paths, unit)).items():
        before = values.get(key)
        if isinstance(before, list) or len(given) > 1:
            values[key] = [*as_list(before), *given]
        else:
            values[key] = given[0]
    return values


def configured(config: Config, operator: Mapping[str, Any]) -> dict[str, Any]:
    """The options below our own ``k3s:``; ``key+`` adds to K3s's files, as it does there."""
    options: dict[str, Any] = {}
    for key, value in config.k3s.items():
        name = key.removesuffix("+")
        if key != name:
            value = [*as_list(options.get(name, operator.get(name))), *as_list(value)]
        options[name] = value
    return options


def as_list(value: Any) -> list[Any]:
    """A setting that may be given once or as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def node_name(paths: Paths, options: Mapping[str, Any]) -> str:
    """The name of this machine's Node: as its kubelet was certified, else as K3s would choose it.

    K3s, pkg/agent/config: ``node-name`` or the host's, in lower case, with the node's id.
    """
    if certified := _certified(paths.k3s_data / "agent/client-kubelet.crt"):
        return certified
    name = str(options.get("node-name") or socket.gethostname()).lower()
    if options.get("with-node-id") in (True, "true"):
        with contextlib.suppress(OSError):
            name += "-" + _text(paths.root / "etc/rancher/node/id").strip()
    return name


def node_ip(options: Mapping[str, Any]) -> str | None:
    """The first ``node-ip``: the one that etcd is known by (K3S.md 5), as everybody writes it.

    None where there is none, or what stands there is no address.
    """
    given = as_list(options.get("node-ip"))
    try:
        return str(ip_address(str(given[0]).split(",")[0].strip())) if given else None
    except ValueError:
        return None


def _certified(certificate: Path) -> str | None:
    try:
        pem = CERTIFICATE.search(read_bounded(certificate, FILE_LIMIT_BYTES))
        if pem is None:
            return None
        subject = x509.load_pem_x509_certificate(pem[0]).subject
        name = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (OSError, ValueError, IndexError):
        return None
    return name.removeprefix(KUBELET) if name.startswith(KUBELET) else None


def _text(path: Path) -> str:
    return read_bounded(path, FILE_LIMIT_BYTES).decode(errors="replace")


def _environment(paths: Paths, name: str) -> dict[str, str]:
    plain = name.removesuffix(".service")
    found = {}
    for file in (
        f"etc/default/{plain}",
        f"etc/sysconfig/{plain}",
        f"etc/systemd/system/{name}.env",
    ):
        with contextlib.suppress(OSError):
            for line in _text(paths.root / file).splitlines():
                key, equals, value = line.strip().partition("=")
                if equals and key in ENVIRONMENT:
                    found[ENVIRONMENT[key]] = value.strip().strip("'\"")
    return found


def _options(words: list[str]) -> dict[str, list[Any]]:
    """The options on a command line, each with what it was given."""
    found: dict[str, list[Any]] = {}
    for number, word in enumerate(words):
        if not word.startswith("--"):
            continue
        key, equals, value = word[2:].partition("=")
        after = words[number + 1] if number + 1 < len(words) else "-"
        given: Any = value if equals else "true" if after.startswith("-") else after
        found.setdefault(key, []).append({"true": True, "false": False}.get(given, given))
    return found
