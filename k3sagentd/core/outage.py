# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the servers as a whole, in one line: none is heard, or too few for etcd."""

from __future__ import annotations

from collections.abc import Iterable

from k3sagentd.core import guards, paxos, roster
from k3sagentd.core.hello import has_etcd, may_be_member
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId, duration

PAGE = "/usr/share/doc/k3sagentd/operations.md"


def unserved(node: Node, now_s: float) -> str | None:
    """No server of the sealed cluster was heard for long: who has it, and the two ways out."""
    since_s = node.unserved_since_s
    if since_s is None or now_s < since_s + node.site.replace_after_s:
        return None
    servers = [each for each in roster.members(node) if _may_have_data(node, each)]
    if not servers or any(roster.absent_since_s(node, each) is None for each in servers):
        return None  # its machine is heard: what is wrong with its K3s, it says itself
    for_long = duration(now_s - since_s)
    names = _names(node, servers)
    if len(servers) == 1 and guards.is_installed_anew(node, servers[0]):
        return (
            f"a person: {names}, the cluster's only server, was installed anew, and the cluster "
            "went with its disk; k3sagentd cluster-init --force on one machine starts a new one"
        )
    if len(servers) == 1:
        return (
            f"{names}, the cluster's only server, not heard for {for_long}: power it on; or, if "
            "its disk is lost for good, k3sagentd cluster-init --force on another machine starts "
            "a new, empty cluster"
        )
    return (
        f"any of the servers {names}, none heard for {for_long}: power on more than half of them; "
        "or, if their disks are lost for good, k3sagentd cluster-init --force on another machine "
        "starts a new, empty cluster"
    )


def quorum_lost(node: Node) -> str | None:
    """Too few of etcd's members are heard: without more of them the cluster takes no changes.

    Of who was never heard we know nothing, and a K3s that is ready here tells us that it is not
    needed. Nor is one that fell silent before the API last answered: perhaps its K3s goes on.
    """
    members = [each for each in roster.members(node) if _is_counted(node, each)]
    if not members:
        return None  # of who was never heard we know nothing
    silent = [each for each in members if roster.absent_since_s(node, each) is not None]
    empty = [each for each in members if each not in silent and not _may_have_data(node, each)]
    empty += [each for each in silent if guards.is_installed_anew(node, each)]
    here = len({*members} - {*silent, *empty})
    needed = paxos.quorum(len(members))
    since_s = max((roster.absent_since_s(node, each) or 0.0 for each in silent), default=0.0)
    if here >= needed or (node.k3s.ready and node.steward.viewed_s > since_s):
        return None
    line = (
        f"{here} of etcd's {len(members)} servers here, {needed} must be, or the cluster takes no "
        "changes: "
    )
    off = [each for each in silent if each not in empty]
    if here + len(off) < needed:
        lost = f"the data of {_names(node, empty)} is lost"
        return f"{line}{lost}; see «etcd lost its quorum» in {PAGE}"
    some = f"{needed - here} of " if needed - here < len(off) else ""
    return f"{line}power on {some}{_names(node, off)}"


def _may_have_data(node: Node, machine: NodeId) -> bool:
    """Whether a listed server has etcd's data, or may have it: a founding server that never joined
    has none."""
    if machine == node.id:
        return may_be_member(node)
    peer = node.peers.get(machine)
    return peer is None or peer.hello.member


def _is_counted(node: Node, machine: NodeId) -> bool:
    """Whether etcd counts on a listed server, though its disk may be empty by now."""
    if _was_removed(node, machine):
        return False
    peer = node.peers.get(machine)
    if peer is None:
        return machine == node.id or (has_etcd(node) and not node.k3s.ready)
    return peer.hello.member or peer.served


def _was_removed(node: Node, machine: NodeId) -> bool:
    """Whether a machine had no Node any more when we looked at the cluster after it fell silent."""
    since_s, view = roster.absent_since_s(node, machine), node.steward.view
    if since_s is None or view is None or node.steward.viewed_s <= since_s:
        return False
    name = node.name_of(machine)
    return not any(kube.node == machine or kube.name == name for kube in view.nodes)


def _names(node: Node, machines: Iterable[NodeId]) -> str:
    return ", ".join(node.name_of(each) for each in machines)
