# SPDX-License-Identifier: Apache-2.0
"""The errands that root is sent on, and what there is in the API to see."""

from dataclasses import replace

from k3sagentd.core.cluster import ClusterView, Errand, KubeNode
from k3sagentd.core.k3s import Outcome
from k3sagentd.core.words import NodeId
from k3sagentd.k3s.errand import carry_out
from k3sagentd.paths import Paths
from tests.unit.fake_api import FakeApi

ME, YOU = NodeId("a" * 32), NodeId("b" * 32)
UID = "01234567-89ab-cdef-0123-456789abcdef"
LOOK = Errand(serial=1, instance="c" * 16, node=ME)
HOLD = replace(LOOK, hold=True)


def k3s(paths: Paths, text: str) -> None:
    """A K3s binary that has only kubectl."""
    binary = paths.root / "bin/k3s"
    binary.write_text(f"#!/bin/sh\n{text}\n")
    binary.chmod(0o755)


def three_servers(api: FakeApi) -> dict[str, str]:
    return {name: api.add_node(name, server=True) for name in ("n1", "n2", "n3")}


def lease(api: FakeApi) -> dict:
    return api.leases["k3sagentd"]


def view_of(paths: Paths, errand: Errand = LOOK) -> ClusterView:
    result = carry_out(paths, errand)
    assert result.outcome is Outcome.DONE, result.reason
    assert result.view is not None
    return result.view


def servers(ready: int, dead: int) -> list[KubeNode]:
    """Some that are ready, and some that are not; the last of them is removed."""
    return [
        KubeNode(name=f"n{n}", uid=UID, node=None, hardware=None, server=True, ready=n < ready)
        for n in range(ready + dead)
    ]
