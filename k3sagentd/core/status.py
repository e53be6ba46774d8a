# SPDX-License-Identifier: Apache-2.0
"""What a node says to people.

``waiting_for`` is the one line that a person reads at every moment; None only when all is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import assert_never

from k3sagentd.core import (
    drive,
    election,
    guards,
    leaving,
    log,
    outage,
    ranking,
    roster,
    standing,
)
from k3sagentd.core.hello import k3s_role, own_hello
from k3sagentd.core.k3s import Action, Outcome, ServerOrAgent
from k3sagentd.core.messages import Hello
from k3sagentd.core.state import Accepting, Node, Preparing
from k3sagentd.core.words import NodePhase, Role, duration


def waiting_for(node: Node, now_s: float) -> str | None:
    """What this node waits for, in one line."""
    line = _waiting_for(node, now_s)
    if line is not None and node.refused and node.phase is not NodePhase.READY:
        address, reason = list(node.refused.items())[-1]
        line += f" ({address} was refused: {reason})"
    return line


def _waiting_for(node: Node, now_s: float) -> str | None:
    if node.storage_failure:
        return f"a disk that takes its state: {node.storage_failure}"
    if node.facts is None:
        return "the facts about this machine's disk (written by k3sagentd facts)"
    if node.address is None:
        return "an address on the network interface"
    trouble = standing.unfinished(node) or standing.moved(node)
    if trouble is not None and node.phase is not NodePhase.READY:
        return f"a person: {trouble}"
    match node.phase:
        case NodePhase.UNCONFIGURED:
            return "a configuration"
        case NodePhase.DISCOVERING:
            return _discovering(node, now_s)
        case NodePhase.ELECTING:
            return _electing(node, now_s)
        case NodePhase.INITIALISING:
            return _initialising(node, now_s)
        case NodePhase.WAITING:
            return _init_node(node, now_s)
        case NodePhase.JOINING | NodePhase.STANDING_DOWN:
            return _joining(node, now_s)
        case NodePhase.CONFLICT:
            return f"a person: {guards.conflict(node)}"
        case NodePhase.FAILED:
            return f"a person: {standing.flag_mismatch(node) or _result(node, now_s)}"
        case NodePhase.READY:
            return None
        case _:
            assert_never(node.phase)


def _discovering(node: Node, now_s: float) -> str:
    if node.attached_s == math.inf:
        return "a network: its interface has no carrier (is the cable plugged in?)"
    trouble = guards.quorum_missing(node)
    if (muted := guards.muted(node)) is not None:
        # What must be mended by hand is said even where machines are missing as well.
        return f"a person: {muted}" + (f"; {trouble}" if trouble else "")
    if trouble is not None:
        return trouble
    if trouble := guards.may_not_propose(node):
        return trouble
    left_s = max(0.0, guards.settled_s(node) - now_s)
    if node.nodes == 1:
        return f"nobody to be heard: looks for a cluster that is there already, {left_s:.0f} s more"
    return f"{node.seen} of {node.nodes} machines here; the others have {left_s:.0f} s more to come"


def _electing(node: Node, now_s: float) -> str:
    reason = guards.misconfigured(node) or node.last_reject
    why = f" ({reason})" if reason else ""
    match node.proposal:
        case Preparing(promises=promises):
            return f"promises: {len(promises)} of {node.nodes} so far, {node.quorum} needed{why}"
        case Accepting(accepted=accepted):
            return f"votes: {len(accepted)} of {node.nodes} so far, {node.quorum} needed{why}"
        case None:
            pass
    order = ranking.ranked(node, (own_hello(node), *node.up))
    if not order:
        return "a machine that may be a server: all here have role: agent or may not vote"
    if (unheard := guards.cluster_out_of_sight(node)) is not None:
        return unheard
    if (idle := _idle_cluster(node, order[0])) is not None:
        return idle
    left_s = node.phase_since_s + election.pause_s(node) - now_s
    if left_s > 0 and isinstance(node.log[-1], log.Abandon):
        name = node.name_of(order[0].node)
        why = node.log[-1].reason
        return f"another attempt of {name} in {duration(left_s)}; the last was given up: {why}"
    again = f" (last time: {reason})" if reason else ""
    return f"{node.name_of(order[0].node)}, which ranks first, to be nominated{again}"


def _idle_cluster(node: Node, best: Hello) -> str | None:
    """Who has a cluster from before and cannot lead, while one that has none ranks first."""
    if guards.claim(node, best) is not None:
        return None
    hellos = (own_hello(node), *node.up)
    idle = next((hello for hello in hellos if guards.claim(node, hello) is not None), None)
    if idle is None:
        return None
    name = f"{node.name_of(idle.node)}, which has K3s data of a cluster"
    if idle.role is Role.AGENT:
        return f"{name}, to be able to lead: role: agent is set there"
    return f"{name} but may not vote, to start the site: see k3sagentd status there"


def _init_node(node: Node, now_s: float) -> str:
    nomination = node.nomination
    assert nomination is not None, "nobody waits without a nomination"
    name = node.name_of(nomination.init)
    peer = node.peers.get(nomination.init)
    if node.generation.number:
        heard = (
            "" if peer is not None and peer.up else "; it is not heard: power it on, or force here"
        )
        return f"{name}, which the operator forced, to start the cluster{heard}"
    if trouble := guards.disagreement(node):
        return f"{name} to start the cluster; votes of this node for it wait: {trouble}"
    if missing := guards.quorum_missing(node):
        return f"{name} to start the cluster; {missing}"
    if peer is not None and peer.able:
        return f"{name} to start the cluster"
    silent_s = now_s - (peer.heard_s if peer else node.started_s)
    after_s = node.site.abandon_after_s
    if silent_s < after_s:
        until = f"another is chosen after {duration(after_s)}"
    else:
        until = "another is being chosen"
    if peer is not None and peer.up:
        return f"{name} to start the cluster; it may not vote and so cannot seal it, {until}"
    return f"{name} to start the cluster; it was not heard for {duration(silent_s)}, {until}"


def _initialising(node: Node, now_s: float) -> str:
    if node.drive.order is None and not drive.may_initialise(node):
        if guards.is_cloned(node):
            return f"a person: {guards.muted(node)}"
        return guards.quorum_missing(node) or "the newest entries of the bootstrap log"
    if node.is_forced:
        return _result(node, now_s)  # nobody votes beside it
    if reason := standing.init_failure(node, now_s):
        missing = guards.quorum_missing(node)
        line = f"{node.quorum} of {node.nodes} to abandon this node: {reason}"
        return f"{line}; {missing}" if missing else line
    if trouble := guards.disagreement(node):
        return f"a quorum to seal the cluster; its own vote waits: {trouble}"
    if (muted := guards.muted(node)) is not None:
        return f"another node to be chosen in its place: {muted}"
    if standing.own_seal(node) is not None:
        missing = guards.quorum_missing(node) or node.last_reject
        return f"a quorum to seal the cluster{f': {missing}' if missing else ''}"
    return _result(node, now_s)


def _joining(node: Node, now_s: float) -> str:
    if line := outage.unserved(node, now_s):
        return line
    asked = node.drive.asks > 0 or node.drive.told is not None
    if guards.is_cloned(node) and (asked or drive.is_kept_out(node, now_s)):
        return f"a person: {guards.muted(node)}"
    stays = standing.is_other_role(node) and k3s_role(node) is ServerOrAgent.AGENT
    if stays and node.leaving is not None and not node.leaving.done:
        told = node.leaving.refused or node.leaving.told or "a ready server of the cluster"
        return f"{told}; then this server becomes an agent"
    retry_at_s = node.drive.retry_at_s
    due = retry_at_s is not None and now_s >= retry_at_s
    asks_anew = due and node.drive.registration is None and not standing.is_member(node)
    if node.drive.outcome is not Outcome.DONE and not asks_anew:
        return _result(node, now_s)
    barrier = standing.join_barrier(node)
    if node.phase is NodePhase.JOINING and not standing.is_member(node):
        prepares = node.drive.order is not None and node.drive.order.action is Action.PREPARE
        if node.drive.prepared and barrier is not None and prepares:
            return barrier
        if node.drive.told is not None and not node.drive.registration:
            return node.drive.told
        if node.drive.registration is None:
            return "a node of the site to hand out the registration address"
    if node.drive.told is not None and drive.is_kept_out(node, now_s):
        return node.drive.told
    return _result(node, now_s)


def _result(node: Node, now_s: float) -> str:
    """How far the order that stands is, or what became of it."""
    result, retry_at_s = node.drive.result, node.drive.retry_at_s
    if node.drive.order is None:
        return "K3s on this machine"
    if node.drive.outcome is Outcome.DONE:
        line = f"K3s on this machine to be ready: {node.k3s.detail}"
        return f"{line}; {lost}" if (lost := outage.quorum_lost(node)) else line
    if result is None:
        return f"k3sagentd-apply to take the order ({node.drive.order.action})"
    if retry_at_s is None:
        return f"{node.drive.order.action}: {result.step}"
    again = f"; tries again in {duration(max(0.0, retry_at_s - now_s))}"
    return f"{node.drive.order.action} failed at «{result.step}»: {result.reason}{again}"


def _servers(node: Node, now_s: float) -> Iterator[str]:
    """What is wrong with the servers of a sealed site, though this machine is ready."""
    if node.phase is not NodePhase.READY:
        return
    if line := outage.unserved(node, now_s):
        yield f"waits for {line}"
        return
    if line := outage.quorum_lost(node):
        yield line
        return
    after_s = node.site.replace_after_s
    for each in roster.members(node):
        since_s = roster.absent_since_s(node, each)
        if since_s is None:
            continue
        silent = f"server {node.name_of(each)} is not heard"
        if now_s < since_s + after_s:
            yield f"{silent}; another machine takes its place after {duration(after_s)}"
        elif roster.is_heard_by_k3s(node, each, now_s):
            yield f"{silent}, but K3s hears it; see why k3sagentd is silent there"
        elif roster.desired(node, now_s) is None:
            yield f"{silent}, and no machine here can take its place; power it on, or add one"
    yield from _own_role(node, now_s)
    steward = node.steward
    if steward.reason and (steward.errand is not None or now_s < steward.not_before_s):
        yield f"the cluster's API: {steward.reason}"


def _own_role(node: Node, now_s: float) -> Iterator[str]:
    """What stands in the way of the role that is set here; nothing while it is being seen to."""
    servers = roster.members(node)
    ready = {*roster.ready_servers(node)}
    if not ready.issuperset(servers) or roster.desired(node, now_s) is not None:
        return
    if node.site.role is Role.SERVER and node.id not in servers:
        yield (
            f"role: server is set here, but {len(servers) + 1} servers are no better than "
            f"{len(servers)}: this machine becomes one when another goes or one more is added"
        )
    if node.site.role is Role.AGENT and node.id in servers:
        yield "role: agent is set here, but no machine can take this server's place; add one"


def notes(node: Node, now_s: float) -> list[str]:
    """What keeps nothing from going on, but should be mended."""
    twins = sorted(
        node.name_of(peer.hello.node)
        for peer in node.peers.values()
        if node.site.machine is not None and peer.hello.machine == node.site.machine
    )
    muted = guards.muted(node) if node.seal is None or guards.is_cloned(node) else None
    found = [muted] if muted else []
    if twins:
        found.append(
            f"{', '.join(twins)} has this machine's machine-id: the card was copied after its "
            "first boot; on all but one: rm -f /etc/machine-id /var/lib/dbus/machine-id; "
            "systemd-machine-id-setup; reboot"
        )
    asked = leaving.waits_for(node)
    if node.leaving is not None and asked and not standing.is_other_role(node):
        found.append(f"k3sagentd leave, {node.leaving.step}: waits for {asked}")
    if node.phase is NodePhase.READY and (half := standing.unfinished(node)):
        found.append(half)
    result = node.drive.result
    if node.phase is NodePhase.READY and result is not None and result.reason is not None:
        # K3s does its part; the rest of what was ordered is tried again all the same.
        found.append(f"{result.order.action} failed at «{result.step}»: {result.reason}")
    return [*found, *_servers(node, now_s)]
