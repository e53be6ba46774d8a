# SPDX-License-Identifier: Apache-2.0
"""What we say to K3s: the drop-in, the token in K3s's form, and the check that K3s will hear it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from k3sagentd.config import Config
from k3sagentd.core.k3s import Action, Order, ServerOrAgent
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError
from k3sagentd.k3s import flags
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import Merged, merge

HEADER = "# Written by k3sagentd for this node; changes here are overwritten.\n"
SECRET = ("token", "agent-token")
DECISIVE = (
    "cluster-init",
    "server",
    *SECRET,
    "token-file",
    "agent-token-file",
    "datastore-endpoint",
    "cluster-reset",
)
"""Keys that decide which cluster a start of K3s makes or joins (K3S.md 1), and who may join it."""


def contents(
    order: Order,
    server: str | None,
    config: Config,
    paths: Paths,
    at: Attachment | None,
    *,
    agent_token: bool = False,
) -> dict[str, Any]:
    """The drop-in's keys for ``order``; ``server`` is the address that was checked.

    ``agent_token``: this server takes agents in by a token of their own.
    """
    operator = _operators(paths)
    options = {key: value for key, value in config.k3s.items() if not key.endswith("+")}
    agent = order.role is ServerOrAgent.AGENT
    if agent:
        options = {key: value for key, value in options.items() if key in flags.AGENT}
    values: dict[str, Any] = dict(options)
    if not agent:
        shared = {k: flags.plain(v) for k, v in order.shared_flags.items()}
        # The operator's own file may say the same already, or in more words.
        values.update({k: v for k, v in shared.items() if k not in values and k not in operator})
        names = [config.registration_address] if config.registration_address else []
        sans = [*_list(operator.get("tls-san")), *_list(options.get("tls-san")), *names]
        if at is not None:
            sans.append(at.address)
        values["tls-san"] = list(dict.fromkeys(sans))
    if order.action is Action.INIT:
        values["cluster-init"] = True
    else:
        values["server"] = server
    values["token-file"] = str(paths.k3s_token)
    if agent_token:
        values["agent-token-file"] = str(paths.k3s_agent_token)
    values["node-name"] = order.node_name
    if at is not None:
        if not {"node-ip"} & (operator.keys() | options.keys()):
            values["node-ip"] = at.address
        if not {"flannel-iface"} & (operator.keys() | options.keys()):
            values["flannel-iface"] = at.interface
    return values


def render(values: Mapping[str, Any]) -> bytes:
    """The file's bytes, the same for equal values."""
    text: str = yaml.safe_dump(dict(values), sort_keys=True)
    return (HEADER + text).encode()


def _operators(paths: Paths) -> dict[str, Any]:
    merged = merge(paths.k3s_config)
    return {k: v for k, v in merged.values.items() if merged.file_of(k) != paths.dropin}


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def check(order: Order, server: str | None, paths: Paths, *, agent_token: bool = False) -> None:
    """Read K3s's configuration as K3s will, and raise ConfigError unless it says what we mean."""
    merged = merge(paths.k3s_config)
    wanted: dict[str, Any] = {"token-file": str(paths.k3s_token)}
    if agent_token:
        wanted["agent-token-file"] = str(paths.k3s_agent_token)
    if order.action is Action.INIT:
        wanted["cluster-init"] = True
    else:
        wanted["server"] = server
    for key in DECISIVE:
        if key in merged.values and merged.values[key] != wanted.get(key):
            _complain(merged, key, paths.dropin)
        if key in wanted and key not in merged.values:
            raise ConfigError(f"{paths.dropin}: {key} is missing")
    if merged.values.get("node-name") != order.node_name:
        _complain(merged, "node-name", paths.dropin)


def _complain(merged: Merged, key: str, dropin: Path) -> None:
    found = "set" if key in SECRET else repr(merged.values[key])
    raise ConfigError(
        f"{merged.file_of(key)}: {key} is {found}; allowed: what {dropin} says; remove {key} there"
    )
