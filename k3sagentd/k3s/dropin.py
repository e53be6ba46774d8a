# SPDX-License-Identifier: Apache-2.0
"""What we say to K3s: the drop-in, the token in K3s's form, and the check that K3s will hear it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from k3sagentd.config import Config
from k3sagentd.core.cluster import HARDWARE_LABEL, NODE_LABEL
from k3sagentd.core.k3s import Action, Datastore, Order, ServerOrAgent
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError
from k3sagentd.k3s import flags
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.settings import as_list, configured
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import OPTION, Merged, is_option, load, merge

log = logging.getLogger(__name__)

HEADER = "# Written by k3sagentd for this node; changes here are overwritten.\n"
DECISIVE = (
    "cluster-init",
    "server",
    "token",
    "agent-token",
    "token-file",
    "agent-token-file",
    "datastore-endpoint",
    "cluster-reset",
)
"""Keys that decide which cluster a start of K3s makes or joins (K3S.md 1), and who may join it."""
ADDRESS = ("node-ip", "flannel-iface")
"""Keys that follow this machine's address, except where etcd knows it by another (K3S.md 8)."""

JOINED = ("node-label", "tls-san")
"""Lists that have of ours and of the operator's."""


def contents(
    order: Order,
    server: str | None,
    config: Config,
    paths: Paths,
    at: Attachment | None,
    names: tuple[str, ...] = (),
    *,
    agent_token: bool = False,
) -> dict[str, Any]:
    """The drop-in's keys for ``order``; ``server`` is the address that was checked, ``names`` are
    those of the cluster beside its fixed addresses.

    ``agent_token``: this server takes agents in by a token of their own.
    """
    theirs = merge(paths.k3s_config, without=paths.dropin)
    _check_joined(theirs)
    operator = theirs.values
    options = configured(config, operator)
    if order.role is ServerOrAgent.AGENT:
        options = {key: value for key, value in options.items() if key in flags.AGENT}
    values: dict[str, Any] = dict(options)
    if order.role is ServerOrAgent.SERVER:
        own = [at.address] if at is not None else []
        sans = [*config.fixed_addresses, *names, *own]
        values |= _of_servers(order, operator, options, sans)
    if order.action is Action.INIT:
        values["cluster-init"] = True
    else:
        values["server"] = server
    values["token-file"] = str(paths.k3s_token)
    if agent_token:
        values["agent-token-file"] = str(paths.k3s_agent_token)
    values["node-name"] = order.node_name
    for key, value in _address(paths, at).items():
        if key not in operator:
            values.setdefault(key, value)
    if labels := _labels(order):
        values["node-label"] = _joined(operator, options, "node-label", labels)
    return values


def _of_servers(
    order: Order,
    operator: Mapping[str, Any],
    options: Mapping[str, Any],
    sans: list[str],
) -> dict[str, Any]:
    """What only servers are told: the site's shared flags, and the names in their certificate."""
    # The operator's own file may say the same already, or in more words.
    values = {
        key: flags.plain(value)
        for key, value in order.shared_flags.items()
        if key not in options and key not in operator
    }
    return values | {"tls-san": _joined(operator, options, "tls-san", sans)}


def _joined(
    operator: Mapping[str, Any], options: Mapping[str, Any], key: str, ours: list[str]
) -> list[Any]:
    """A list of everybody's: later files win as a whole (K3S.md 5), so ours has all."""
    everything = [*as_list(operator.get(key)), *as_list(options.get(key)), *ours]
    return list(dict.fromkeys(everything))


def _check_joined(merged: Merged) -> None:
    """Raise ConfigError where what others set cannot be joined with ours."""
    for key in JOINED:
        value = merged.values.get(key)
        if value is not None and not is_option(value):
            file = merged.file_of(key)
            raise ConfigError(f"{file}: {key} is {value!s:.80}; allowed: {OPTION}")


def _address(paths: Paths, at: Attachment | None) -> dict[str, str]:
    """Where this machine is; with etcd data, where etcd knows it to be (K3S.md 8)."""
    before = {key: value for key, value in present(paths).items() if key in ADDRESS}
    if at is None:
        return before
    now = {"node-ip": at.address, "flannel-iface": at.interface}
    return now | before if datastore(paths.k3s_data) is Datastore.ETCD else now


def _labels(order: Order) -> list[str]:
    """Which machine a Node is, for those who clear up after it (``core.cluster``)."""
    pairs = ((NODE_LABEL, order.node), (HARDWARE_LABEL, order.hardware))
    return [f"{key}={value}" for key, value in pairs if value]


def render(values: Mapping[str, Any]) -> bytes:
    """The file's bytes, the same for equal values."""
    text: str = yaml.safe_dump(dict(values), sort_keys=True)
    return (HEADER + text).encode()


def present(paths: Paths) -> dict[str, Any]:
    """The drop-in that is there, empty where there is none; raises ConfigError."""
    return load(paths.dropin) if paths.dropin.exists() else {}


def check(order: Order, server: str | None, paths: Paths, *, agent_token: bool = False) -> None:
    """Read K3s's configuration as K3s will, and raise ConfigError unless it says what we mean."""
    merged = merge(paths.k3s_config)
    _check_joined(merged)
    wanted: dict[str, Any] = {"token-file": str(paths.k3s_token)}
    if agent_token:
        wanted["agent-token-file"] = str(paths.k3s_agent_token)
    if order.action is Action.INIT:
        wanted["cluster-init"] = True
    else:
        wanted["server"] = server
    for key in DECISIVE:
        if key in merged.values and merged.values[key] != wanted.get(key):
            _complain(merged, key, paths)
        if key in wanted and key not in merged.values:
            raise ConfigError(f"{paths.dropin}: {key} is missing")
    if merged.values.get("node-name") != order.node_name:
        _complain(merged, "node-name", paths)
    if not set(_labels(order)) <= set(as_list(merged.values.get("node-label"))):
        # K3s runs without them; but nobody clears up after a Node that does not say whose it is.
        log.warning("%s hides our node-label; use node-label+", merged.file_of("node-label"))


def _complain(merged: Merged, key: str, paths: Paths) -> None:
    found = flags.shown(key, merged.values[key])
    raise ConfigError(
        f"{merged.file_of(key)}: {key} is {found}; allowed: what {paths.dropin} says; remove {key} "
        "there"
    )
