# SPDX-License-Identifier: Apache-2.0
"""How a node leaves the cluster: it asks a ready server to drain it, then to delete its Node.

What happens on the machine between the two steps (K3s is stopped) is the command's
(``k3sagentd leave``); who may leave is the server's to say (``staying.refusal``). A server that
becomes an agent asks only whether it may stop. It stops before its member is removed: what K3s does
with a member that was removed while it ran is to start anew, and not in every release by joining.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from k3sagentd.core import names
from k3sagentd.core.k3s import Datastore
from k3sagentd.core.messages import LeaveAnswer, LeaveRequest, LeaveStep
from k3sagentd.core.registration import spread
from k3sagentd.core.state import Leaving, Node
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId

ASK_S = 2.0
"""Before a server is asked how far it is, or the next one."""

GRANT_S = 10.0
"""For how long a server's word that this one may stop counts: servers go off unasked."""


def begin(turn: Turn, step: LeaveStep) -> None:
    """This step is wanted; one that is under way goes on, one that was refused is asked again."""
    now = turn.node.leaving
    if now is not None and now.step is step and now.refused:
        turn.set(leaving=replace(now, refused=None, told=now.refused))
    elif now is None or now.step is not step or now.done:
        turn.set(leaving=Leaving(step=step))


def may_stop(node: Node, now_s: float) -> bool:
    """Whether the cluster can do without this server, by an answer that is as good as new."""
    leaving = node.leaving
    if leaving is None or leaving.step is not LeaveStep.STOP:
        return False
    return leaving.done and now_s < leaving.asked_s + GRANT_S


def run(turn: Turn) -> None:
    """Ask a ready server; who never came into a cluster has nothing to ask."""
    node, leaving = turn.node, turn.node.leaving
    if leaving is None or leaving.done or leaving.refused:
        return
    if _never_came_in(node):
        turn.set(leaving=replace(leaving, done=True))
        return
    if turn.now_s < leaving.asked_s + ASK_S:
        return
    if node.seal is None:
        told = "a peer that knows the site's cluster: this machine does not any more"
        turn.set(leaving=replace(leaving, asked_s=turn.now_s, told=told))
        return
    servers = [hello.node for hello in node.kin if hello.server_url]
    if not servers:
        only = node.id in node.roster.servers and len(node.roster.servers) == 1
        why = "this is the only server: the cluster would end with it" if only else None
        told = "a ready server of the cluster"
        turn.set(leaving=replace(leaving, asked_s=turn.now_s, refused=why, told=told))
        return
    order = spread(node.id, servers)
    # Who has begun goes on with it: what was drained is known to that server alone.
    peer = leaving.asked if leaving.asked in order else order[0]
    turn.set(leaving=replace(leaving, asked_s=turn.now_s, asked=peer))
    turn.send(peer, LeaveRequest(step=leaving.step, node_name=names.keep(turn)))


def _never_came_in(node: Node) -> bool:
    """Whether this machine is in no cluster; one that lost its log may be in one."""
    blank = node.facts is not None and node.facts.datastore is Datastore.NONE
    knows = node.seal is not None and node.durable.node_name is not None
    return blank and not knows and not node.k3s.running and not node.k3s.ready


def on_answer(turn: Turn, sender: NodeId, message: LeaveAnswer) -> None:
    """Take in how far the server is."""
    leaving = turn.node.leaving
    if leaving is None or leaving.asked != sender or leaving.step is not message.step:
        return
    told = f"{turn.node.name_of(sender)}: {message.waits_for}" if message.waits_for else None
    turn.set(leaving=replace(leaving, done=message.done, refused=message.refused, told=told))


def waits_for(node: Node) -> str | None:
    """What the step that is under way waits for; None where there is none."""
    leaving = node.leaving
    if leaving is None or leaving.done or leaving.refused:
        return None
    return leaving.told or "a server"


def deadlines(node: Node) -> Iterator[float]:
    """When a server is asked again."""
    leaving = node.leaving
    if leaving is not None and not leaving.done and not leaving.refused:
        yield leaving.asked_s + ASK_S
