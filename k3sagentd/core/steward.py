# SPDX-License-Identifier: Apache-2.0
"""What a ready server does for the cluster as a whole: who is a server, and which Nodes must go.

One server at a time decides, the one that holds the Lease; it is taken when there is something to
decide, and given back. The Lease's resourceVersion is what makes a decision one: an errand that was
decided on an older one fails. Nothing is looked at while there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from k3sagentd.core import namesake, ranking, roster, staying
from k3sagentd.core.cluster import ClusterView, Errand, ErrandResult, KubeNode, Roster
from k3sagentd.core.effects import WriteErrand
from k3sagentd.core.hello import server_url
from k3sagentd.core.k3s import Outcome, ServerOrAgent
from k3sagentd.core.messages import (
    LeaveAnswer,
    LeaveRequest,
    LeaveStep,
    NotYet,
    Registration,
    RegistrationRequest,
)
from k3sagentd.core.registration import registration
from k3sagentd.core.state import Node, Wish
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, NodePhase

VIEW_S = 30.0
"""A look at the cluster is good for so long."""
BUSY_S = 5.0
"""Before it is looked again whether another holder has given the Lease back, or K3s a Node up."""
LEASE_S = 60.0
"""A Lease that its holder has not written for so long is anybody's. Longer than any errand but a
drain takes, and judged by our own clock, as client-go does (tools/leaderelection)."""
ERRAND_TIMEOUT_S = 900.0
"""After this an errand without an end was lost with the process that had taken it."""
RETRY_S = 5.0
RETRY_LIMIT_S = 300.0
WISH_S = 30.0
"""Who does not ask again for so long does not want it any more."""
DOING = {
    LeaveStep.DRAIN: "its pods to go elsewhere",
    LeaveStep.STOP: "enough other servers to be ready",
    LeaveStep.REMOVE: "its Node to be removed",
}
WISHES_LIMIT = 512
"""Peers that may wait for us at a time."""


def is_steward(node: Node) -> bool:
    """Whether this node speaks to the cluster's API: its own server is ready."""
    return node.phase is NodePhase.READY and server_url(node) is not None


# --- errands --------------------------------------------------------------------------------


def run(turn: Turn) -> None:
    """Give the errand that is due, if any."""
    node, now_s = turn.node, turn.now_s
    steward = node.steward
    busy = steward.errand is not None and now_s < steward.ordered_s + ERRAND_TIMEOUT_S
    if not is_steward(node) or busy or now_s < steward.not_before_s:
        return
    changes = _next(node, now_s)
    if changes is None:
        return
    serial = steward.serial + 1
    errand = Errand(serial=serial, instance=node.site.instance, node=node.id, **changes)
    turn.set(steward=replace(steward, errand=errand, serial=serial, ordered_s=now_s))
    turn.effects.append(WriteErrand(errand=errand))


def _next(node: Node, now_s: float) -> dict[str, Any] | None:
    """What the next errand is to do; None for nothing, an empty one only looks."""
    steward, view = node.steward, node.steward.view
    if view is None:
        return {}  # what is written there, and what an earlier holder left undone
    stale = now_s >= steward.viewed_s + VIEW_S
    work = _work(node, view, now_s)
    if (
        roster.must_look(node, now_s)
        or (stale and work)
        or any(_is_unseen(node, w, now_s) for w in steward.wishes.values())
    ):
        return {}
    mine = view.holder == node.id
    held = {"hold": True, "lease_version": view.lease_version}
    if work is None:
        return held | {"release": True} if mine else None
    if not mine and view.holder is not None and now_s < steward.lease_since_s + LEASE_S:
        return {} if now_s >= steward.viewed_s + BUSY_S else None
    return held | work if mine else held


def _is_unseen(node: Node, wish: Wish, now_s: float) -> bool:
    """Whether somebody waits for a look that is newer than the last."""
    if now_s >= wish.heard_s + WISH_S:
        return False
    viewed_s = node.steward.viewed_s
    if now_s >= viewed_s + VIEW_S or (wish.step is not None and viewed_s < wish.since_s):
        return True
    # K3s gives up a Node that it does not hear any more within the minute.
    kube = _node_named(node.steward.view, wish.node_name) if node.steward.view else None
    fading = wish.role is not None and now_s < wish.since_s + staying.FADING_S
    return fading and kube is not None and kube.ready and now_s >= viewed_s + BUSY_S


def _work(node: Node, view: ClusterView, now_s: float) -> dict[str, Any] | None:
    """The next thing to decide, as fields of an errand; None when all is well."""
    servers = roster.desired(node, now_s)
    if servers is not None:
        written = view.roster.revision if view.roster is not None else 0
        revision = max(written, node.roster.revision) + 1
        found = Roster(revision=revision, servers=servers, init=node.roster.init)
        # Who strikes itself out is no server any more, and could not give it back later.
        return {"roster": found, "release": node.id not in servers}
    for left in view.nodes:
        if _is_left_over(node, left, now_s):
            return {"remove": left.name, "uid": left.uid}
    for peer, wish in sorted(node.steward.wishes.items()):
        kube = _node_named(view, wish.node_name)
        if kube is None or now_s >= wish.heard_s + WISH_S:
            continue
        if wish.step is not None:
            if _is_anothers(node, kube, peer):
                continue
            asked = wish.step is not LeaveStep.STOP and not _is_done(node, view, wish)
            if asked and staying.refusal(node, kube, wish.step) is None:
                return _leave_work(kube, wish)
        elif namesake.is_left_behind(node, kube, peer, now_s):
            return {"remove": kube.name, "uid": kube.uid}
    return None


def _leave_work(kube: KubeNode, wish: Wish) -> dict[str, Any]:
    if wish.step is LeaveStep.DRAIN:
        return {"drain": kube.name}
    return {"remove": kube.name, "uid": kube.uid, "dead": False}


def _is_left_over(node: Node, kube: KubeNode, now_s: float) -> bool:
    """A server's Node that is dead and that the roster does not list: its member must go.

    Adopted servers may be members that no roster lists; such a one may just be starting anew.
    """
    owner = staying.owner_of(node, kube)
    if node.roster.revision == 0 or not kube.server or kube.ready or owner is None:
        return False
    if owner in node.roster.servers:
        return False
    peer = node.peers.get(owner)
    if peer is not None and not peer.up and peer.hello.adopted:
        return roster.is_gone(node, owner, now_s)
    return peer is None or not peer.up or not peer.hello.member


def on_ended(turn: Turn, result: ErrandResult) -> None:
    """Take in what root did and saw; what an earlier run of the daemon asked means nothing."""
    steward, view = turn.node.steward, result.view
    if steward.errand is None or result.errand != steward.errand:
        return
    errand = steward.errand
    done = result.outcome is Outcome.DONE
    lost_race = not done and errand.hold and view is not None and view.holder != turn.node.id
    changes: dict[str, Any] = {"errand": None, "reason": None if lost_race else result.reason}
    if view is not None:
        changes |= {"view": view, "viewed_s": turn.now_s}
        before = steward.view.lease_version if steward.view is not None else None
        if view.lease_version != before:
            changes["lease_since_s"] = turn.now_s
    if done or lost_race:
        changes |= {"failures": 0, "not_before_s": turn.now_s}
        if done:
            changes["wishes"] = _granted(steward.wishes, errand)
        if done and (errand.roster or errand.drain or errand.remove):
            turn.report(f"{errand.describe()}: done")
    else:
        failures = steward.failures + 1
        share = ranking.lot(turn.node.site.election_key, turn.node.id)[0] / 255
        pause_s = min(RETRY_LIMIT_S, RETRY_S * 2 ** min(failures - 1, 6)) * (0.5 + 0.5 * share)
        changes |= {"failures": failures, "not_before_s": turn.now_s + pause_s}
        if result.reason != steward.reason:
            turn.report(f"{errand.describe()} failed: {result.reason}")
    turn.set(steward=replace(steward, **changes))
    if view is not None:
        roster.learn(turn, view.roster)
        _answer_who_waits(turn)


def _answer_who_waits(turn: Turn) -> None:
    """Who was told to wait need not ask again to hear that the wait is over."""
    for peer, wish in turn.node.steward.wishes.items():
        if wish.role is None or turn.now_s >= wish.heard_s + WISH_S:
            continue
        request = RegistrationRequest(role=wish.role, node_name=wish.node_name)
        answer = _judge(turn.node, peer, request, turn.now_s)
        if isinstance(answer, Registration):
            _forget(turn, peer)
            turn.send(peer, answer)


def _granted(wishes: Any, errand: Errand) -> dict[NodeId, Wish]:
    return {
        peer: replace(wish, drained=wish.drained or wish.node_name == errand.drain)
        for peer, wish in wishes.items()
    }


def deadlines(node: Node) -> Iterator[float]:
    """When ``run`` may have something to do that only time brings."""
    if not is_steward(node):
        return
    steward, replace_after_s = node.steward, node.site.replace_after_s
    yield steward.not_before_s
    if steward.errand is not None:
        yield steward.ordered_s + ERRAND_TIMEOUT_S
    if steward.view is not None and steward.view.holder is not None:
        yield steward.lease_since_s + LEASE_S
        yield steward.viewed_s + BUSY_S
    if steward.wishes:
        yield steward.viewed_s + VIEW_S
        yield steward.viewed_s + BUSY_S
    yield node.rostered_s + replace_after_s
    if node.short_since_s is not None:
        yield node.short_since_s + replace_after_s
    for machine in roster.members(node):
        if (since_s := roster.absent_since_s(node, machine)) is not None:
            yield since_s + replace_after_s
            yield roster.look_again_s(node)


# --- who wants something of us --------------------------------------------------------------


def answer_joiner(
    turn: Turn, sender: NodeId, message: RegistrationRequest
) -> Registration | NotYet | None:
    """Hand out the registration, or say what must be out of the way first."""
    answer = _judge(turn.node, sender, message, turn.now_s)
    if isinstance(answer, NotYet):
        _wish(turn, sender, message.node_name, role=message.role)
    else:
        _forget(turn, sender)
    return answer


def _judge(
    node: Node, sender: NodeId, message: RegistrationRequest, now_s: float
) -> Registration | NotYet | None:
    listed = sender in roster.members(node)
    role = ServerOrAgent.SERVER if listed else ServerOrAgent.AGENT
    if not is_steward(node):
        return registration(node, sender, role)
    view = node.steward.view
    if view is None or now_s >= node.steward.viewed_s + VIEW_S:
        soon = node.steward.failures == 0
        return NotYet(reason="the list of the cluster's Nodes to be read", soon=soon)
    if not listed and sender in (roster.desired(node, now_s, sender) or ()):
        return NotYet(reason="this machine to be listed as a server", soon=True)
    kube = _node_named(view, message.node_name)
    if kube is None or not namesake.is_in_the_way(kube, sender):
        return registration(node, sender, role)
    if still := namesake.still_there(node, kube, sender, now_s):
        return NotYet(reason=still)
    why = f" ({node.steward.reason})" if node.steward.reason else ""
    reason = f"the Node {kube.name} of an earlier installation to be removed{why}"
    return NotYet(reason=reason, soon=not why)


def answer_leaver(turn: Turn, sender: NodeId, message: LeaveRequest) -> LeaveAnswer:
    """How far we are with helping ``sender`` out of the cluster."""
    node, now_s = turn.node, turn.now_s
    step, view = message.step, node.steward.view
    if not is_steward(node):
        return LeaveAnswer(step=step, done=False, waits_for="its server to be ready")
    kube = _node_named(view, message.node_name) if view is not None else None
    if kube is not None and _is_anothers(node, kube, sender):
        anothers = f"the Node {kube.name} is another machine's"
        return LeaveAnswer(step=step, done=False, refused=anothers)
    wish = _wish(turn, sender, message.node_name, step=step)
    if view is None or _is_unseen(node, wish, now_s):
        waits_for = "the list of the cluster's Nodes to be read"
        return LeaveAnswer(step=step, done=False, waits_for=waits_for)
    if _is_done(node, view, wish):
        if step is not LeaveStep.DRAIN:
            _forget(turn, sender)
        return LeaveAnswer(step=step, done=True)
    assert kube is not None, "who is not there is done"
    refused = staying.refusal(node, kube, step)
    doing = DOING[step]
    waits_for = f"{doing}; {node.steward.reason}" if node.steward.reason else doing
    return LeaveAnswer(step=step, done=False, refused=refused, waits_for=waits_for)


def _is_anothers(node: Node, kube: KubeNode, leaver: NodeId) -> bool:
    """Whether a Node is not the leaver's: two machines may have one hostname."""
    owner = staying.owner_of(node, kube)
    if owner is None and kube.name == node.durable.node_name:
        owner = node.id
    return owner not in (None, leaver)


def _is_done(node: Node, view: ClusterView, wish: Wish) -> bool:
    kube = _node_named(view, wish.node_name)
    if kube is None or (wish.step is LeaveStep.DRAIN and wish.drained):
        return True
    return wish.step is LeaveStep.STOP and staying.refusal(node, kube, wish.step) is None


def _wish(
    turn: Turn,
    sender: NodeId,
    node_name: str,
    *,
    role: ServerOrAgent | None = None,
    step: LeaveStep | None = None,
) -> Wish:
    """Note what a peer wants, or that it still wants it."""
    steward = turn.node.steward
    wish = steward.wishes.get(sender)
    if wish is None or (wish.node_name, wish.role, wish.step) != (node_name, role, step):
        wish = Wish(
            node_name=node_name, heard_s=turn.now_s, since_s=turn.now_s, role=role, step=step
        )
    wish = replace(wish, heard_s=turn.now_s)
    wishes = {
        peer: each
        for peer, each in steward.wishes.items()
        if turn.now_s < each.heard_s + WISH_S and peer != sender
    }
    if len(wishes) < WISHES_LIMIT:
        turn.set(steward=replace(steward, wishes={**wishes, sender: wish}))
    return wish


def _forget(turn: Turn, sender: NodeId) -> None:
    steward = turn.node.steward
    if sender in steward.wishes:
        wishes = {peer: wish for peer, wish in steward.wishes.items() if peer != sender}
        turn.set(steward=replace(steward, wishes=wishes))


def _node_named(view: ClusterView, name: str) -> KubeNode | None:
    return next((each for each in view.nodes if each.name == name), None)
