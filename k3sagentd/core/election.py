# SPDX-License-Identifier: Apache-2.0
"""Votes and ballots: the acceptor that answers, the proposer that asks, the learner that keeps.

Each function takes the turn under way (``turn.Turn``) and leaves its effects in it. Persisting
comes before the answer, always.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from k3sagentd.core import guards, log, paxos, ranking
from k3sagentd.core.hello import own_hello
from k3sagentd.core.k3s import K3sState
from k3sagentd.core.log import Abandon, Nominate, Seal, Value
from k3sagentd.core.messages import (
    Accept,
    Accepted,
    Intent,
    Learned,
    Prepare,
    Promise,
    Reject,
)
from k3sagentd.core.paxos import Acceptor, Ballot
from k3sagentd.core.state import Accepting, Drive, Node, Preparing, Steward
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, short

GRACE_S = 0.5
"""How long a proposer with a quorum waits for the others, so that the best servers are found."""
BALLOT_TIMEOUT_S = 3.0
"""After this a phase that has no quorum is given up: 100 times a slow card's fsync."""
STAGGER_S = 1.5
"""Between the proposers' turns, by rank: longer than an undisturbed ballot takes."""
BACKOFF_LIMIT_S = 30.0
HOPELESS_BACKOFF_S = 600.0
"""What the pause grows to where no ballot can have a value."""
BALLOTS_FOR_FOUNDERS = 3
"""Ballots that a proposer gives up because a promise was lost that would make one more server."""
EPOCH_PAUSE_S = 60.0
EPOCH_PAUSE_LIMIT_S = 3600.0
"""Between epochs once every machine here has failed as init node: doubled each time round, so that
the log's limit (``log.ENTRIES_LIMIT``) lasts for weeks and not for minutes."""


# --- the acceptor ---------------------------------------------------------------------------


def answer_prepare(turn: Turn, sender: NodeId, message: Prepare) -> Promise | Reject | Learned:
    """Phase 1b: promise, refuse, or tell what is chosen already."""
    node = turn.node
    if node.generation.number or node.seal is not None:
        return chosen_from(node, 0)
    if message.decree < len(node.log):
        return chosen_from(node, message.decree)
    if reason := _refusal(turn, sender, message, message.intent):
        return _reject(node, message, reason)
    acceptor = paxos.promise(node.durable.acceptor, message.ballot)
    if acceptor is None:
        return _reject(node, message, "has promised a higher ballot")
    _vote(turn, acceptor, message.ballot)
    return Promise(decree=message.decree, ballot=message.ballot, accepted=acceptor.accepted)


def answer_accept(turn: Turn, sender: NodeId, message: Accept) -> Accepted | Reject | Learned:
    """Phase 2b: accept, refuse, or tell what is chosen already."""
    node = turn.node
    if node.generation.number or node.seal is not None:
        return chosen_from(node, 0)
    if message.decree < len(node.log):
        return chosen_from(node, message.decree)
    reason = (
        log.flaw(message.decree, message.value)
        or guards.foreign_nomination(node, message.value)
        or _refusal(turn, sender, message, message.value)
    )
    if reason:
        return _reject(node, message, reason)
    acceptor = paxos.accept(node.durable.acceptor, message.ballot, message.value)
    if acceptor is None:
        return _reject(node, message, "has promised a higher ballot")
    _vote(turn, acceptor, message.ballot)
    return Accepted(decree=message.decree, ballot=message.ballot)


def _refusal(
    turn: Turn, sender: NodeId, message: Prepare | Accept, what: Intent | Value
) -> str | None:
    node = turn.node
    if message.decree > len(node.log):
        return f"has not learned entry {len(node.log)} yet"
    return (
        guards.counts_otherwise(node, sender, message.nodes)
        or guards.may_not_vote(node)
        or guards.keeps_the_init_node(node, sender, what, turn.now_s)
        or guards.nominates_out_of_sight(node, what)
    )


def _vote(turn: Turn, acceptor: Acceptor, ballot: Ballot) -> None:
    if acceptor != turn.node.durable.acceptor:
        turn.persist(acceptor=acceptor, nodes=turn.node.nodes)
    turn.set(highest_round=max(turn.node.highest_round, ballot.round))


def _reject(node: Node, message: Prepare | Accept, reason: str) -> Reject:
    return Reject(
        decree=message.decree,
        ballot=message.ballot,
        promised=node.durable.acceptor.promised if message.decree == len(node.log) else None,
        log_length=len(node.log),
        reason=reason,
    )


# --- the proposer ---------------------------------------------------------------------------


def propose(turn: Turn, intent: Intent, wanted: Value | None) -> None:
    """Phase 1a: open a ballot of our own for the decree that is open."""
    node = turn.node
    promised = node.durable.acceptor.promised
    highest = max(node.highest_round, promised.round if promised else 0)
    ballot = Ballot(round=highest + 1, node=node.id)
    prepare = Prepare(decree=len(node.log), ballot=ballot, intent=intent, nodes=node.nodes)
    answer = answer_prepare(turn, node.id, prepare)
    if not isinstance(answer, Promise):
        back_off(turn, answer.reason if isinstance(answer, Reject) else "entry is chosen")
        return
    turn.set(
        proposal=Preparing(
            decree=prepare.decree,
            ballot=ballot,
            intent=intent,
            wanted=wanted,
            promises={node.id: answer.accepted},
            grace_until_s=turn.now_s + GRACE_S,
            deadline_s=turn.now_s + BALLOT_TIMEOUT_S,
        )
    )
    turn.send_all(prepare)
    advance(turn)


def pause_s(node: Node, value: Value | None = None) -> float:
    """How long to wait with a nomination of who failed before; without one: of the best here."""
    if not node.log:
        return 0.0
    if isinstance(value, Nominate):
        init: NodeId | None = value.init
    else:
        best = ranking.ranked(node, (own_hello(node), *node.up))[:1]
        init = best[0].node if best else None
    failures = log.abandonments(node.log)[init] if init else 0
    if failures == 0:
        return 0.0
    return min(EPOCH_PAUSE_LIMIT_S, EPOCH_PAUSE_S * 2.0 ** min(failures - 1, 10))


def _prepare(node: Node, proposal: Preparing) -> Prepare:
    return Prepare(
        decree=proposal.decree, ballot=proposal.ballot, intent=proposal.intent, nodes=node.nodes
    )


def on_promise(turn: Turn, sender: NodeId, message: Promise) -> None:
    """Count a promise for our ballot; one of another ballot is late and means nothing."""
    proposal = turn.node.proposal
    if not isinstance(proposal, Preparing) or not _ours(proposal, message):
        return
    promises = {**proposal.promises, sender: message.accepted}
    turn.set(proposal=replace(proposal, promises=promises))
    advance(turn)


def on_accepted(turn: Turn, sender: NodeId, message: Accepted) -> None:
    """Count an acceptance of our ballot."""
    proposal = turn.node.proposal
    if not isinstance(proposal, Accepting) or not _ours(proposal, message):
        return
    turn.set(proposal=replace(proposal, accepted=proposal.accepted | {sender}))
    advance(turn)


def on_reject(turn: Turn, sender: NodeId, message: Reject) -> None:
    """Someone will not follow: help it up if it is behind, else remember why."""
    node = turn.node
    proposal = node.proposal
    ours = proposal is not None and _ours(proposal, message)
    if message.log_length < len(node.log) and not node.generation.number:
        turn.send(sender, chosen_from(node, message.log_length))
        if ours and isinstance(proposal, Preparing) and sender not in proposal.helped:
            turn.set(proposal=replace(proposal, helped=proposal.helped | {sender}))
            turn.send(sender, _prepare(node, proposal))
    if proposal is None or not ours:
        return
    if message.decree == len(node.log) == message.log_length and message.promised:
        turn.set(highest_round=max(node.highest_round, message.promised.round))
        if message.promised > proposal.ballot:
            back_off(turn, f"{node.name_of(sender)} {message.reason}")
            return
    turn.set(last_reject=f"{node.name_of(sender)} {message.reason}")


def _ours(proposal: Preparing | Accepting, message: Promise | Accepted | Reject) -> bool:
    return message.decree == proposal.decree and message.ballot == proposal.ballot


def advance(turn: Turn) -> None:
    """Go on with our ballot as far as the answers and the time allow."""
    node = turn.node
    proposal = node.proposal
    if isinstance(proposal, Preparing) and len(proposal.promises) >= node.quorum:
        everybody = len(proposal.promises) >= node.seen
        bound = paxos.constrained(proposal.promises.values())
        free_nomination = proposal.intent is Intent.NOMINATE and bound is None
        if everybody or not free_nomination or turn.now_s >= patience_until_s(node, proposal):
            retries_left = node.failures < BALLOTS_FOR_FOUNDERS
            if free_nomination and _wants_founders(node, proposal) and retries_left:
                back_off(turn, "too few promises for all founding servers")
                return
            value = bound.value if bound else proposal.wanted or _nomination(node, proposal)
            if value is None:
                elsewhere = guards.cluster_out_of_sight(node) or guards.cluster_elsewhere(node)
                # Only a person changes that: no write to each disk twice a minute until then.
                reason = elsewhere or "no machine here may be a server"
                back_off(turn, reason, limit_s=HOPELESS_BACKOFF_S)
            elif free_nomination and turn.now_s < node.phase_since_s + pause_s(node, value):
                back_off(turn, "who promised has failed before, the others have some time yet")
            else:
                _ask_to_accept(turn, proposal, value)
            return
    elif isinstance(proposal, Accepting) and len(proposal.accepted) >= node.quorum:
        votes = len(proposal.accepted)
        chosen = Learned(
            first=proposal.decree, entries=(proposal.value,), nodes=node.nodes, votes=votes
        )
        learn(turn, chosen, announce=True)
        return
    if proposal is not None and turn.now_s >= proposal.deadline_s:
        stage = "promises" if isinstance(proposal, Preparing) else "acceptances"
        back_off(turn, node.last_reject or f"too few {stage} in time")


def patience_until_s(node: Node, proposal: Preparing) -> float:
    """Until when a proposer with a quorum waits for more promises.

    Founding servers are chosen among those that promised, and for good: while there are fewer
    than the site should have, a machine that is here but slow is worth most of the ballot's time.
    """
    if _wants_founders(node, proposal):
        return proposal.deadline_s - GRACE_S
    return proposal.grace_until_s


def _wants_founders(node: Node, proposal: Preparing) -> bool:
    """Whether a machine that is here but did not promise would make the site one server richer."""
    here = ranking.ranked(node, (own_hello(node), *node.up))
    promised = [hello for hello in here if hello.node in proposal.promises]
    servers = node.site.servers
    return ranking.odd(min(servers, len(promised))) < ranking.odd(min(servers, len(here)))


def _nomination(node: Node, proposal: Preparing) -> Nominate | None:
    hellos = [hello for hello in (own_hello(node), *node.up) if hello.node in proposal.promises]
    best = [hello.node for hello in ranking.ranked(node, hellos)]
    here = (own_hello(node), *node.up)
    has = [hello.node for hello in here if guards.claim(node, hello) is not None]
    if not best or (has and best[0] not in has) or guards.cluster_out_of_sight(node):
        return None  # a nomination beside a cluster that is there would only be abandoned
    founders = best[: ranking.odd(min(node.site.servers, len(best)))]
    return Nominate(init=founders[0], servers=tuple(founders))


def _ask_to_accept(turn: Turn, proposal: Preparing, value: Value) -> None:
    node = turn.node
    request = Accept(decree=proposal.decree, ballot=proposal.ballot, value=value, nodes=node.nodes)
    answer = answer_accept(turn, node.id, request)
    if not isinstance(answer, Accepted):
        back_off(turn, answer.reason if isinstance(answer, Reject) else "entry is chosen")
        return
    turn.set(
        proposal=Accepting(
            decree=proposal.decree,
            ballot=proposal.ballot,
            value=value,
            accepted=frozenset({node.id}),
            deadline_s=turn.now_s + BALLOT_TIMEOUT_S,
        )
    )
    turn.send_all(request)
    advance(turn)


def back_off(turn: Turn, reason: str, *, limit_s: float = BACKOFF_LIMIT_S) -> None:
    """Give our ballot up and leave the others time; the pause grows with each failure."""
    failures = turn.node.failures + 1
    share = ranking.lot(turn.node.site.election_key, turn.node.id)[0] / 255
    pause_s = min(limit_s, STAGGER_S * 2 ** min(failures, 10)) * (0.5 + 0.5 * share)
    turn.set(
        proposal=None,
        failures=failures,
        last_reject=reason,
        propose_not_before_s=turn.now_s + pause_s,
    )


# --- the learner ----------------------------------------------------------------------------


def chosen_from(node: Node, first: int) -> Learned:
    """What we know to be chosen, from entry ``first`` on."""
    votes = node.votes.get(len(node.log) - 1)
    return Learned(
        first=first,
        entries=node.log[first:],
        nodes=node.nodes,
        generation=node.generation,
        votes=votes,
    )


def learn(turn: Turn, message: Learned, *, announce: bool = False) -> None:
    """Take chosen entries in; a contradiction to what we know stops this node for good."""
    if message.generation != turn.node.generation and not _follow(turn, message):
        return
    node = turn.node
    if node.seal is not None:
        return  # it ends the log for ever, whatever others have
    counted = message.nodes == node.nodes or message.generation.number > 0
    sealed = message.entries and isinstance(message.entries[-1], Seal)
    if message.first > len(node.log) or not (counted or sealed):
        return
    known = node.log[message.first :]
    if any(a != b for a, b in zip(known, message.entries, strict=False)):
        _split(turn, message)
        return
    fresh = message.entries[len(known) :]
    if not fresh:
        return
    if len(node.log) + len(fresh) > log.ENTRIES_LIMIT or any(
        log.flaw(len(node.log) + i, value) for i, value in enumerate(fresh)
    ):
        return
    votes = dict(node.votes)
    last = message.first + len(message.entries) - 1
    if message.votes is not None:
        votes[last] = message.votes
    # What was learned was counted by somebody's nodes: from here on we count alike.
    nodes = message.nodes if node.durable.nodes is None else node.durable.nodes
    turn.persist(log=node.log + fresh, acceptor=Acceptor(), nodes=nodes)
    turn.set(
        proposal=None,
        failures=0,
        highest_round=0,
        propose_not_before_s=0.0,
        last_reject=None,
        votes=votes,
    )
    for offset, value in enumerate(fresh):
        _report(turn, len(node.log) + offset, value)
    if announce:
        turn.send_all(chosen_from(turn.node, len(node.log)))


def _follow(turn: Turn, message: Learned) -> bool:
    """Change over to a higher generation, if this machine's K3s holds nothing of the lower one."""
    node = turn.node
    begins = message.first == 0 and message.entries
    if not begins or message.generation < node.generation or guards.holds_data(node):
        return False
    turn.report(f"follows the start that {node.name_of(message.generation.by)} was forced to")
    open_generation(turn, message.generation)
    return True


def open_generation(turn: Turn, generation: log.Generation, **durable: Any) -> None:
    """Begin a log anew; what was voted and learned in the one before counts no more."""
    turn.persist(
        **{"started_epoch": None, "started_generation": 0}
        | durable
        | {"generation": generation, "log": (), "acceptor": Acceptor(), "roster": None}
    )
    turn.set(
        proposal=None,
        drive=Drive(),
        steward=Steward(),
        k3s=K3sState(),
        votes={},
        last_new_s=turn.now_s,
    )


def _split(turn: Turn, message: Learned) -> None:
    text = (
        f"entry {message.first} of the bootstrap log is {message.entries[0].describe()} on a peer "
        f"but {turn.node.log[message.first].describe()} here: two sites share this token"
    )
    turn.set(split=text, proposal=None)
    turn.report(text)


def _report(turn: Turn, decree: int, value: Value) -> None:
    node = turn.node
    count = node.votes.get(decree)
    votes = f" with {count} of {node.nodes} votes" if count else ""
    epoch = log.epoch_of(decree)
    match value:
        case Nominate():
            servers = ", ".join(node.name_of(server) for server in value.servers)
            turn.report(
                f"epoch {epoch}: {node.name_of(value.init)} ({short(value.init)}) is nominated"
                f"{votes}; founding servers: {servers}"
            )
        case Seal():
            turn.report(
                f"epoch {epoch}: sealed{votes}; the cluster has CA {value.ca_hash[:12]} "
                f"at {', '.join(value.addresses)}"
            )
        case Abandon():
            turn.report(f"epoch {epoch}: abandoned{votes}: {value.reason}")
