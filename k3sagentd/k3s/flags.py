# SPDX-License-Identifier: Apache-2.0
"""K3s's options: which every server of a cluster must share (K3S.md 4), in one canonical form;
which agents take; which hold a secret, and how the others are quoted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SHARED = frozenset(
    {
        "cluster-cidr",
        "cluster-dns",
        "cluster-domain",
        "disable",
        "disable-cloud-controller",
        "disable-helm-controller",
        "disable-kube-proxy",
        "disable-network-policy",
        "disable-service-lb",
        "egress-selector-mode",
        "embedded-registry",
        "flannel-backend",
        "flannel-external-ip",
        "flannel-ipv6-masq",
        "secrets-encryption",
        "service-cidr",
    }
)
"""Compared by K3s since v1.20.13 (pkg/cluster, ``critical configuration``), and ``disable`` and
``disable-kube-proxy``, which its documentation requires to be equal."""
AGENT = frozenset(
    {
        "container-runtime-endpoint",
        "debug",
        "flannel-conf",
        "flannel-cni-conf",
        "image-service-endpoint",
        "kubelet-arg",
        "kube-proxy-arg",
        "lb-server-port",
        "log",
        "node-external-ip",
        "node-label",
        "node-taint",
        "pause-image",
        "prefer-bundled-bin",
        "private-registry",
        "protect-kernel-defaults",
        "resolv-conf",
        "selinux",
        "snapshotter",
        "v",
        "vmodule",
        "with-node-id",
    }
)
"""Options that ``k3s agent`` takes as well (K3s, pkg/cli/cmds/agent.go)."""

SECRET = frozenset(
    {
        "agent-token",
        "cluster-secret",
        "datastore-endpoint",
        "etcd-s3-access-key",
        "etcd-s3-proxy",
        "etcd-s3-secret-key",
        "etcd-s3-session-token",
        "token",
        "vpn-auth",
    }
)
"""Options whose value is a secret, or may have one in it (K3s, pkg/cli/cmds/{server,agent}.go). And
``…-arg``: what somebody passes through K3s, nobody knows."""


def shown(key: str, value: Any) -> str:
    """How a message quotes an option: what is said goes to the journal and, as the reason of a
    failed start, to every machine of the site."""
    text = str(value)
    unfit = key.endswith("-file") and not text.startswith("/")  # the secret, not where it is
    login = "@" in text  # as in https://user:password@host
    if key in SECRET or key.endswith("-arg") or unfit or login:
        return "set"
    return f"{value!r:.80}"


def shared(options: Mapping[str, Any]) -> dict[str, str]:
    """The shared flags among ``options``, canonical."""
    return {key: canonical(value) for key, value in options.items() if key in SHARED}


def canonical(value: Any) -> str:
    """One text for equal settings: order and form of a list do not matter."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if "," in value else value
    if isinstance(value, list):
        items = sorted({str(item) for item in value})
        return items[0] if len(items) == 1 else json.dumps(items)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def plain(text: str) -> Any:
    """What to write into K3s's configuration for a canonical text."""
    if text.startswith("["):
        return json.loads(text)
    return {"true": True, "false": False}.get(text, text)
