# SPDX-License-Identifier: Apache-2.0
"""The faults that ``make planted`` puts into the product, one at a time.

Those marked (found) are the simulator's own finds, planted again.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.dice import Fault


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Replaces ``old`` by ``new`` within one function of a module."""

    where: str
    """``module:function`` or ``module:Class.method``."""
    old: str
    new: str


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One fault, and within how many runs it must be caught."""

    name: str
    edits: tuple[Edit, ...]
    runs: int
    focus: tuple[Fault, ...] = ()
    """Faults that its runs have more of; empty: the runs are those of ``make sim``."""
    seed: int | None = None
    """Of the run that caught it the last time, which is looked at first. A change of the core or
    of the simulator makes it another run; then the hunt is on again."""


def _plant(
    name: str,
    runs: int,
    *edits: tuple[str, str, str],
    focus: tuple[Fault, ...] = (),
    seed: int | None = None,
) -> Planted:
    return Planted(
        name=name,
        runs=runs,
        focus=focus,
        seed=seed,
        edits=tuple(Edit(where=where, old=old, new=new) for where, old, new in edits),
    )


CORE = "k3sagentd.core"
NEVER = "if False:"

FAULTS = (
    # --- the disk
    _plant(
        "answers before the fsync",
        50,
        (
            f"{CORE}.machine:step",
            "return turn.node, tuple(turn.effects)",
            'late = sorted(turn.effects, key=lambda e: type(e).__name__ == "Persist")\n'
            "    return turn.node, tuple(late)",
        ),
    ),
    _plant(
        "renames before the data is synced",
        50,
        ("tests.sim.disk:Disk.save", "self._synced = True", "pass"),
    ),
    _plant(
        "does not sync the directory after the rename",
        50,
        (
            "tests.sim.disk:Disk.save",
            "self.outcomes = (durable,) if self._synced else (durable, None)",
            "pass",
        ),
    ),
    _plant(
        "votes with a damaged state",
        300,
        (
            "k3sagentd.store:restore",
            "return Durable(node=node, muted=reason), False",
            "return Durable(node=node), False",
        ),
        seed=59,
    ),
    _plant(
        "a muted node votes",
        300,
        (f"{CORE}.guards:may_not_vote", "    if node.durable.muted:", f"    {NEVER}"),
    ),
    _plant(
        "a learned entry is not persisted",
        50,
        (
            f"{CORE}.election:learn",
            "turn.persist(log=node.log + fresh, acceptor=Acceptor(), nodes=nodes)",
            "turn.set(durable=replace(node.durable, log=node.log + fresh, acceptor=Acceptor()))",
        ),
    ),
    _plant(
        "the start of an epoch is not persisted",
        50,
        (
            f"{CORE}.drive:_remember",
            "node_name=name, started_epoch=epoch, started_generation=generation, starts=starts",
            "node_name=name, starts=starts",
        ),
    ),
    # --- the acceptor
    _plant(
        "the own vote is not persisted",
        50,
        (
            f"{CORE}.election:_ask_to_accept",
            "answer = answer_accept(turn, node.id, request)",
            "answer = Accepted(decree=request.decree, ballot=request.ballot)",
        ),
    ),
    _plant(
        "accepts below its promise",
        500,
        (
            f"{CORE}.paxos:accept",
            'accepting, or None where a higher ballot has its word."""'
            "\n    if acceptor.promised is not None and ballot < acceptor.promised:",
            f'accepting."""\n    {NEVER}',
        ),
        seed=33,
    ),
    _plant(
        "promises below its promise",
        200,
        (
            f"{CORE}.paxos:promise",
            'its promise, or None where a higher ballot has its word."""'
            "\n    if acceptor.promised is not None and ballot < acceptor.promised:",
            f'its promise."""\n    {NEVER}',
        ),
    ),
    _plant(
        "does not tell what it accepted",
        500,
        (f"{CORE}.election:answer_prepare", "accepted=acceptor.accepted)", "accepted=None)"),
        seed=84,
    ),
    _plant(
        "votes on an entry that is not open",
        500,
        (f"{CORE}.election:_refusal", "if message.decree > len(node.log):", NEVER),
        seed=334,
    ),
    _plant(
        "keeps the votes of the last entry for the next",
        50,
        (
            f"{CORE}.election:learn",
            "log=node.log + fresh, acceptor=Acceptor()",
            "log=node.log + fresh",
        ),
    ),
    _plant(
        "votes whatever nodes are counted by",
        500,
        (f"{CORE}.guards:counts_otherwise", "    if nodes == node.nodes:", "    if True:"),
        (
            f"{CORE}.guards:may_not_vote",
            "    return disagreement(node) or behind(node) or crowd(node)",
            "    return behind(node) or crowd(node)",
        ),
        seed=94,
    ),
    _plant(
        "honours a new nodes after a vote",
        300,
        (
            f"{CORE}.state:Node.nodes",
            "return self.durable.nodes if self.durable.nodes is not None else self.site.nodes",
            "return self.site.nodes",
        ),
        focus=(Fault.RECONFIGURED,),
        seed=43,
    ),
    _plant(
        "votes for a new cluster though it has one",
        1000,
        (
            f"{CORE}.guards:foreign_nomination",
            "if not isinstance(value, Nominate):",
            "if True:",
        ),
        (
            f"{CORE}.guards:existing_cluster",
            "    if facts is None or facts.datastore",
            "    return None\n    if facts is None or facts.datastore",
        ),
    ),
    # --- the proposer
    _plant(
        "a quorum is one too small",
        200,
        (f"{CORE}.paxos:quorum", "return nodes // 2 + 1", "return max(1, nodes // 2)"),
    ),
    _plant(
        "ignores an accepted value",
        500,
        (
            f"{CORE}.election:advance",
            "bound = paxos.constrained(proposal.promises.values())",
            "bound = None",
        ),
        seed=84,
    ),
    _plant(
        "uses a ballot again after a restart",
        500,
        (
            f"{CORE}.election:propose",
            "highest = max(node.highest_round, promised.round if promised else 0)",
            "highest = node.highest_round",
        ),
        seed=51,
    ),
    _plant(
        "counts a vote twice from one node",
        500,
        (
            f"{CORE}.election:on_accepted",
            "accepted=proposal.accepted | {sender}",
            'accepted=proposal.accepted | {f"{sender} {len(proposal.accepted)}"}',
        ),
        seed=75,
    ),
    # --- the lifecycle
    _plant(
        "prepares K3s before the seal",
        50,
        (
            f"{CORE}.drive:run",
            "        case NodePhase.JOINING:\n            _join(turn)",
            "        case NodePhase.WAITING:\n            _ensure(turn, Action.PREPARE)\n"
            "        case NodePhase.JOINING:\n            _join(turn)",
        ),
    ),
    _plant(
        "stands down from a sealed epoch",
        50,
        (
            f"{CORE}.log:is_abandoned",
            "return outcome < len(log) and isinstance(log[outcome], Abandon)",
            "return outcome < len(log)",
        ),
    ),
    _plant(
        "stands down on another epoch's abandonment",
        500,
        (
            f"{CORE}.standing:must_stand_down",
            "log.is_abandoned(node.log, started)",
            "bool(log.abandonments(node.log))",
        ),
    ),
    _plant(
        "a cluster that was there loses its claim once started (found)",
        3000,
        (
            f"{CORE}.guards:existing_cluster",
            "    if facts is None or facts.datastore",
            "    if node.durable.started_epoch is not None:\n        return None\n"
            "    if facts is None or facts.datastore",
        ),
        seed=603,
    ),
    _plant(
        "does not notice its clone",
        500,
        (f"{CORE}.peers:on_hello", "if hello.instance != node.site.instance:", NEVER),
        (f"{CORE}.peers:on_hello", "if flips >= FLIPS_OF_CLONES:", NEVER),
    ),
    # --- after the seal
    _plant(
        "writes the roster without the Lease",
        200,
        (f"{CORE}.steward:_next", "return held | work if mine else held", "return work"),
        focus=(Fault.SERVER_GONE,),
    ),
    _plant(
        "follows a forced start with data of the old cluster",
        1000,
        (
            f"{CORE}.guards:holds_data",
            "    order, outcome = node.drive.order",
            "    return False\n    order, outcome = node.drive.order",
        ),
        focus=(Fault.FORCED,),
        seed=35,
    ),
    # --- that it finishes, and says what it waits for
    _plant(
        "takes an old hello for a new one",
        500,
        (
            f"{CORE}.peers:on_hello",
            "older = hello.instance == before.hello.instance and",
            "older = False and",
        ),
        seed=383,
    ),
    _plant(
        "does not freeze nodes with what it learns (found)",
        2000,
        (
            f"{CORE}.election:learn",
            "nodes = message.nodes if node.durable.nodes is None else node.durable.nodes",
            "nodes = node.durable.nodes",
        ),
        focus=(Fault.RECONFIGURED,),
        seed=613,
    ),
    _plant(
        "is not due at the moment that it is due (found)",
        200,
        (
            f"{CORE}.registration:ask",
            "if turn.now_s < due_s(node):",
            "if turn.now_s <= due_s(node):",
        ),
    ),
    _plant(
        "an order that was lost is not given again",
        500,
        (
            f"{CORE}.drive:order_due_s",
            "        return drive.ordered_s + ORDER_TIMEOUT_S",
            "        return None",
        ),
        seed=75,
    ),
    _plant(
        "an init node that cannot vote keeps its epoch (found)",
        1000,
        (f"{CORE}.state:Peer.able", "return self.up and self.hello.may_vote", "return self.up"),
        seed=158,
    ),
    _plant(
        "nominates the one that failed again and again (found)",
        1000,
        (f"{CORE}.ranking:ranked", "failed[hello.node],", "failed[hello.node] > 0,"),
        seed=433,
    ),
    _plant(
        "says a number that is not true",
        1000,
        (
            f"{CORE}.guards:quorum_missing",
            'return f"{node.seen} of {node.nodes} machines here, {node.quorum} must agree"',
            'return f"{node.seen + 1} of {node.nodes} machines here, {node.quorum} must agree"',
        ),
        seed=200,
    ),
)
