# SPDX-License-Identifier: Apache-2.0
"""The flags that every server of a cluster must share (K3S.md 4), in one canonical form."""

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
