# SPDX-License-Identifier: Apache-2.0
"""The configuration: ``config.yaml`` and its drop-ins, each setting one record (design, 3).

Owns what is allowed. Every error names the file, the key, what was found and what is allowed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

from k3sagentd.core.k3s import RELEASE
from k3sagentd.core.words import Role
from k3sagentd.discovery.seeds import split
from k3sagentd.errors import ConfigError
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import OPTION, Merged, is_option, merge

NODES_LIMIT = 99
"""Voters; a site may have any number of machines once it is sealed."""
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LABEL = r"[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
"""Labels of RFC 1123, section 2.1; an IPv4 address has that form as well."""
HOST_LIMIT = 253
LOGIN = re.compile(r"//[^/@]*@")
"""In a URL (RFC 3986, section 3.2.1)."""
PREFLIGHT = ("foreign", "cgroup", "memory", "disk", "ports", "clock")
"""What is looked at before K3s is installed (``k3s/preflight.py``)."""
OURS = {
    "cluster-init": "the site decides who starts the cluster",
    "server": "the registration address is found by the nodes",
    "token": "set token-file of k3sagentd",
    "token-file": "set token-file of k3sagentd",
    "agent-token": "it follows from the token of the site",
    "agent-token-file": "it follows from the token of the site",
    "node-name": "it is the hostname, made unique where it must be",
    "datastore-endpoint": "the cluster's datastore is embedded etcd",
    "data-dir": "it is /var/lib/rancher/k3s",
    "cluster-reset": "a setting that is for one run would stay",
    "cluster-reset-restore-path": "a setting that is for one run would stay",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """How K3s comes onto this machine."""

    method: str = "script"
    script: str = "https://get.k3s.io"
    script_sha256: str | None = None
    version: str | None = None
    channel: str = "stable"
    binary: Path = Path("/usr/local/bin/k3s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One machine's configuration; durations in seconds."""

    token_file: Path
    nodes: int
    servers: int
    role: Role = Role.AUTO
    interface: str | None = None
    registration_address: str | None = None
    virtual_ip: IPv4Interface | None = None
    virtual_router_id: int | None = None
    seeds: tuple[str, ...] = ()
    port: int = 6440
    settle_s: float = 3.0
    abandon_after_s: float = 1800.0
    replace_after_s: float = 1800.0
    forget_token: bool = False
    fix_cmdline: bool = False
    allow_reboot: bool = False
    ignore_preflight: tuple[str, ...] = ()
    install: Install = field(default_factory=Install)
    k3s: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fixed_addresses(self) -> tuple[str, ...]:
        """Addresses of the cluster that stay when servers come and go, best first."""
        virtual = (str(self.virtual_ip.ip),) if self.virtual_ip else ()
        given = (self.registration_address,) if self.registration_address else ()
        return tuple(dict.fromkeys((*given, *virtual)))


@dataclass(frozen=True, slots=True)
class Setting:
    """One key: how to read its value (raising ValueError with what is allowed), and its field."""

    key: str
    parse: Callable[[Any], Any]
    field: str
    quoted: bool = True
    """False: no message shows the value, which may have a secret in it, if only by mistake."""


def load_config(paths: Paths) -> Config:
    """Read, merge and check the configuration; raises ConfigError with every mistake."""
    merged = merge(paths.config)
    if not merged.files:
        raise ConfigError(
            f"{paths.config}: no such file; allowed: a YAML file with at least nodes: N"
        )
    values, mistakes = _read(merged, SETTINGS, "")
    install, more = _read(merged.inner("install"), INSTALL_SETTINGS, "install.")
    mistakes += [*more, *_wrong_numbers(merged, values), *_wrong_options(merged, values)]
    if mistakes:
        raise ConfigError(*mistakes)
    values.setdefault("servers", 1 if values["nodes"] < 3 else 3)
    values.setdefault("token_file", paths.token)
    values.pop("install", None)
    return Config(**values, install=Install(**install))


def _wrong_numbers(merged: Merged, values: Mapping[str, Any]) -> Iterator[str]:
    nodes, servers = values.get("nodes"), values.get("servers")
    if merged.values.get("nodes") is None:
        yield (
            f"{merged.files[0]}: nodes is missing; allowed: the number of machines that this "
            f"site starts with, 1 to {NODES_LIMIT}"
        )
    if nodes is not None and servers is not None and servers > nodes:
        yield (
            f"{merged.file_of('servers')}: servers is {servers}; allowed: at most nodes, "
            f"which is {nodes}"
        )


def _wrong_options(merged: Merged, values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.get("k3s", {}).items():
        file, plain = merged.file_of("k3s"), key.rstrip("+")
        if plain in OURS:
            allowed = f"any K3s option but {plain} ({OURS[plain]})"
            yield f"{file}: k3s.{key} is set; allowed: {allowed}"
        elif not is_option(value):
            yield f"{file}: k3s.{key} is {_kind(value)}; allowed: {OPTION}"


def _read(
    merged: Merged, settings: tuple[Setting, ...], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """The values that are fine, and what is wrong with the others."""
    known = {setting.key: setting for setting in settings}
    values, mistakes = {}, []
    for key, value in merged.values.items():
        file = merged.file_of(key)
        setting = known.get(key)
        if setting is None:
            allowed = ", ".join(sorted(known))
            mistakes.append(f"{file}: {prefix}{key} is not a setting; allowed: {allowed}")
            continue
        if value is None:
            continue
        try:
            values[setting.field] = setting.parse(value)
        except ValueError as error:
            found = _shown(value) if setting.quoted else _kind(value)
            mistakes.append(f"{file}: {prefix}{key} is {found}; allowed: {error}")
    return values, mistakes


def _shown(value: Any) -> str:
    """As people read it; but no mapping, which may hold anything, and no login of a URL."""
    if isinstance(value, dict):
        return _kind(value)
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{LOGIN.sub('//…@', shown):.80}"


def _kind(value: Any) -> str:
    names = ((dict, "a mapping"), (list, "a list"), (str, "a text"))
    return next((name for kind, name in names if isinstance(value, kind)), "no text")


# --- parsers --------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("an absolute path")
    return Path(value)


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a number from {low} to {high}")
        return value

    return parse


def _odd(value: Any) -> int:
    if type(value) is not int or value < 1 or value % 2 == 0 or value > NODES_LIMIT:
        raise ValueError("an odd number (etcd gains nothing from an even member), 1, 3, 5 …")
    return value


def _role(value: Any) -> Role:
    if value not in list(Role):
        raise ValueError(", ".join(Role))
    return Role(value)


def _choice(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(", ".join(allowed))
        return str(value)

    return parse


def _duration(value: Any) -> float:
    match = DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a duration such as 500ms, 3s, 30m, 2h")
    return float(match[1]) * UNITS_S[match[2]]


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _checks(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(each in PREFLIGHT for each in value):
        raise ValueError(f"a list of {', '.join(PREFLIGHT)}")
    return tuple(value)


def _host(value: Any) -> str:
    if not isinstance(value, str) or not _is_host(value):
        raise ValueError("an IP address or a host name")
    return value


def _is_host(text: str) -> bool:
    if ":" not in text:
        return len(text) <= HOST_LIMIT and HOST.fullmatch(text) is not None
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False


def _virtual_ip(value: Any) -> IPv4Interface:
    allowed = "an IPv4 address with the prefix of its network, such as 10.0.0.100/24"
    try:
        found = IPv4Interface(value) if isinstance(value, str) and "/" in value else None
    except ValueError:
        found = None
    if found is None or found.network.prefixlen > 30:
        raise ValueError(allowed)
    if found.ip in (found.network.network_address, found.network.broadcast_address):
        raise ValueError(f"{allowed}; that is the network's own or its broadcast address")
    if found.is_loopback or found.is_multicast or found.is_unspecified or found.is_link_local:
        raise ValueError(f"{allowed}; that is no address of a machine on a network")
    return found


def _seeds(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("a list of host[:port]")
    for seed in value:
        try:
            split(seed, 6440)
        except ValueError as error:
            raise ValueError(f"a list of host[:port], and {error}") from None
    return tuple(value)


def _script(value: Any) -> str:
    if not isinstance(value, str) or not re.match(r"https://[^/]|file:///|/", value):
        raise ValueError("https://…, file:///… or an absolute path")
    return value


def _sha256(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("64 hex characters")
    return value.lower()


def _version(value: Any) -> str:
    if not isinstance(value, str) or not RELEASE.fullmatch(value):
        raise ValueError("a K3s version such as v1.33.4+k3s1")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a mapping")
    return value


def _k3s(value: Any) -> dict[str, Any]:
    for key in _mapping(value):
        if not re.fullmatch(r"[a-z0-9-]+\+?", str(key)):
            begin = re.split(r"[^\w-]", str(key))[0]  # the rest may be its value
            raise ValueError(
                "K3s options in kebab-case, each with a colon and a space behind it; "
                f"{begin!r} is none"
            )
    return dict(value)


SETTINGS = (
    Setting("token-file", _path, "token_file", quoted=False),
    Setting("nodes", _integer(1, NODES_LIMIT), "nodes"),
    Setting("servers", _odd, "servers"),
    Setting("role", _role, "role"),
    Setting("interface", _text, "interface"),
    Setting("registration-address", _host, "registration_address"),
    Setting("virtual-ip", _virtual_ip, "virtual_ip"),
    Setting("virtual-router-id", _integer(1, 255), "virtual_router_id"),
    Setting("seeds", _seeds, "seeds"),
    Setting("port", _integer(1, 65535), "port"),
    Setting("settle", _duration, "settle_s"),
    Setting("abandon-after", _duration, "abandon_after_s"),
    Setting("replace-after", _duration, "replace_after_s"),
    Setting("forget-token", _bool, "forget_token"),
    Setting("fix-cmdline", _bool, "fix_cmdline"),
    Setting("allow-reboot", _bool, "allow_reboot"),
    Setting("ignore-preflight", _checks, "ignore_preflight"),
    Setting("install", _mapping, "install"),
    Setting("k3s", _k3s, "k3s", quoted=False),
)
INSTALL_SETTINGS = (
    Setting("method", _choice("script", "exec"), "method"),
    Setting("script", _script, "script"),
    Setting("script-sha256", _sha256, "script_sha256"),
    Setting("version", _version, "version"),
    Setting("channel", _text, "channel"),
    Setting("binary", _path, "binary"),
)
