# SPDX-License-Identifier: Apache-2.0
"""The cluster of a scenario: Nodes and a Lease of memory, and root, who does what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from k3sagentd.core.cluster import ClusterView, Errand, ErrandResult, KubeNode, Roster
from k3sagentd.core.k3s import Outcome
from k3sagentd.core.words import NodeId

RELEASE = "v1.33.4+k3s1"


@dataclass
class Kube:
    """One cluster; ``is_ready`` tells whether K3s hears the machine behind a Node."""

    is_ready: Callable[[KubeNode], bool]
    nodes: dict[str, KubeNode] = field(default_factory=dict)
    version: int | None = None
    holder: NodeId | None = None
    roster: Roster | None = None

    def register(self, node: NodeId, hardware: str | None, *, server: bool) -> None:
        """The Node of a machine that is called by its id."""
        name = node.partition("-")[0]
        known = self.nodes.get(name)
        uid = known.uid if known else f"u{len(self.nodes)}"
        self.nodes[name] = KubeNode(
            name=name,
            uid=uid,
            node=node,
            hardware=hardware,
            server=server,
            ready=True,
            release=RELEASE,
        )

    def view(self) -> ClusterView:
        """As one look shows it."""
        return ClusterView(
            nodes=tuple(replace(n, ready=self.is_ready(n)) for n in self.nodes.values()),
            lease_version=None if self.version is None else str(self.version),
            holder=self.holder,
            roster=self.roster,
        )

    def do(self, errand: Errand) -> ErrandResult:
        """What root would do (``k3s/errand.py``)."""
        reason = self._do(errand)
        outcome = Outcome.DONE if reason is None else Outcome.FAILED
        return ErrandResult(errand=errand, outcome=outcome, reason=reason, view=self.view())

    def _do(self, errand: Errand) -> str | None:
        if not errand.hold:
            return None
        if errand.lease_version != (None if self.version is None else str(self.version)):
            return "the lease was changed meanwhile"
        self.version = (self.version or 0) + 1
        self.holder = None if errand.release else errand.node
        self.roster = errand.roster or self.roster
        if errand.remove is not None:
            self.nodes.pop(errand.remove, None)
        return None
