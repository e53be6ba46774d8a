# SPDX-License-Identifier: Apache-2.0
"""Every run of a small site: all orders of deliveries, all losses, duplicates and a crash anywhere.

Three acceptors, two of them proposers, from an empty log through nominate to seal or abandon. The
functions that run are the product's; only time is taken out of them: a proposer may open a ballot,
or give one up for the next, at any moment, which is more than the timers allow.

The network is a set (as in Lamport's TLA+ specification of Paxos): a message in it may be delivered
now, later, twice, or never, so loss, delay, duplication and reordering need no steps of their own.
It leaves the set once no receiver could do anything with it any more. Whoever learned an entry may
tell any other at any moment. A crash may come between any two effects and leaves what was persisted
by then. States are small numbers, so that the search ends; it is complete for the bound it prints.

Left out, because each can only make a node do less: refusals (a proposer may give up anyway), and
the guard that keeps an init node that is heard (``guards.keeps_the_init_node``).
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from k3sagentd.core import election, guards, machine
from k3sagentd.core.effects import Effect, Persist, Send
from k3sagentd.core.hello import own_hello
from k3sagentd.core.k3s import Facts
from k3sagentd.core.log import Abandon, Seal, Value
from k3sagentd.core.messages import (
    Accept,
    Accepted,
    Intent,
    Learned,
    Message,
    Prepare,
    Promise,
    Reject,
)
from k3sagentd.core.paxos import Ballot
from k3sagentd.core.state import Accepting, Durable, Node, Peer, Site
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, Role

NODES = (NodeId("a"), NodeId("b"), NodeId("c"))
PROPOSERS = (0, 1)
PATIENT_S = election.BALLOT_TIMEOUT_S - 0.1
"""The time at which answers are read: patience is over, the ballot is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How far the search goes."""

    decrees: int
    """Entries of the log: 1 is nominate, 2 is nominate and then seal or abandon."""
    ballots: int
    """Ballots that each proposer may open for each entry: at most 3."""
    crashes: int

    def describe(self) -> str:
        """As people read it."""
        return (
            f"3 acceptors, 2 proposers, {self.decrees} entries, {self.ballots} ballots for each "
            f"proposer and entry, crashes: {self.crashes}"
        )


BOUNDS = (
    Bound(decrees=2, ballots=1, crashes=1),
    Bound(decrees=1, ballots=2, crashes=0),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one node does with one input: each prefix of its effects is a place to crash."""

    node: int
    sent: int
    prefixes: tuple[tuple[int, int], ...]
    """(state after a restart there, messages that had left)."""


State = tuple[int, int, int, int, int, int, int]
"""Three nodes, the messages, the votes ever cast on entries that some node still lacks, ballots
that were opened (two bits for each proposer and entry), and crashes that are left."""


class BrokenError(AssertionError):
    """A state that must not be."""


class Search:
    """All states within a bound."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._nodes: list[Node] = []
        self._node_ids: dict[str, int] = {}
        self._messages: list[tuple[int, int | None, Message]] = []
        """Sender, receiver (None: all others), message."""
        self._message_ids: dict[str, int] = {}
        self._votes: list[tuple[int, Ballot, int, Value]] = []
        """Entry, ballot, voter, value."""
        self._vote_of: list[int] = []
        """For each node state, the bit of the vote that it holds."""
        self._vote_ids: dict[str, int] = {}
        self._delivered: dict[tuple[int, int], Outcome | None] = {}
        self._learned: dict[tuple[int, int], Outcome | None] = {}
        self._proposed: dict[int, Outcome | None] = {}
        self._checked: set[tuple[int, int, int, int]] = set()
        self._peers: list[dict[NodeId, Peer]] = []
        self.steps = 0

    # --- nodes and messages as numbers ------------------------------------------------------

    def _fresh(self, number: int, durable: Durable) -> Node:
        site = Site(
            nodes=len(NODES),
            servers=1,
            # The third only votes: what is proposed then depends on who is asked.
            role=Role.AUTO if number in PROPOSERS else Role.AGENT,
            election_key=b"k",
            hostname=NODES[number],
            instance="1",
        )
        node = machine.new_node(site, durable, 0.0)
        return node.but(facts=Facts(fsync_ms=1.0), address="10.0.0.1")

    def _node(self, node: Node) -> int:
        """The number of a node's state, without what only people read."""
        plain = node.but(
            now_s=0.0, failures=0, last_reject=None, votes={}, propose_not_before_s=0.0, peers={}
        )
        key = repr((plain.durable, plain.proposal, plain.highest_round, plain.split))
        if key not in self._node_ids:
            self._node_ids[key] = len(self._nodes)
            number = NODES.index(node.id)
            self._nodes.append(plain.but(peers=self._peers[number]))
            self._vote_of.append(self._vote(number, plain.durable))
        return self._node_ids[key]

    def _vote(self, number: int, durable: Durable) -> int:
        accepted = durable.acceptor.accepted
        if accepted is None:
            return 0
        vote = (len(durable.log), accepted.ballot, number, accepted.value)
        if repr(vote) not in self._vote_ids:
            self._vote_ids[repr(vote)] = len(self._votes)
            self._votes.append(vote)
        return 1 << self._vote_ids[repr(vote)]

    def _message(self, sender: int, effect: Send) -> int:
        message = effect.message
        if isinstance(message, (Reject, Learned)):
            return 0  # see the head of this file; who learned may tell at any moment
        to = None if isinstance(message, (Prepare, Accept)) else NODES.index(effect.to)
        key = repr((sender, to, message))
        if key not in self._message_ids:
            self._message_ids[key] = len(self._messages)
            self._messages.append((sender, to, message))
        return 1 << self._message_ids[key]

    def _outcome(self, before: int, turn: Turn) -> Outcome:
        number = NODES.index(turn.node.id)
        durable, sent = self._nodes[before].durable, 0
        prefixes = [(self._node(self._fresh(number, durable)), 0)]
        effects: list[Effect] = turn.effects
        for effect in effects:
            if isinstance(effect, Persist):
                durable = effect.durable
            elif isinstance(effect, Send):
                sent |= self._message(number, effect)
            prefixes.append((self._node(self._fresh(number, durable)), sent))
        return Outcome(self._node(turn.node), sent, tuple(dict.fromkeys(prefixes)))

    # --- what can happen --------------------------------------------------------------------

    def _deliver(self, node: int, message: int) -> Outcome | None:
        key = (node, message)
        if key not in self._delivered:
            sender, to, what = self._messages[message]
            number = NODES.index(self._nodes[node].id)
            outcome = None
            if number != sender and to in (None, number):
                turn = Turn(self._nodes[node], PATIENT_S)
                machine._on_message(turn, NODES[sender], what)
                outcome = self._outcome(node, turn)
                if outcome.node == node and not outcome.sent:
                    outcome = None
            self._delivered[key] = outcome
        return self._delivered[key]

    def _learn(self, node: int, teacher: int) -> Outcome | None:
        """One node tells another all that it learned."""
        key = (node, teacher)
        if key not in self._learned:
            log = self._nodes[teacher].log
            outcome = None
            if len(log) > len(self._nodes[node].log):
                turn = Turn(self._nodes[node], PATIENT_S)
                election.learn(turn, Learned(first=0, entries=log, nodes=len(NODES)))
                outcome = self._outcome(node, turn)
            self._learned[key] = outcome
        return self._learned[key]

    def _propose(self, node: int) -> Outcome | None:
        """A ballot of one's own, instead of the one that is under way."""
        if node not in self._proposed:
            self._proposed[node] = self._propose_now(self._nodes[node])
        return self._proposed[node]

    def _propose_now(self, node: Node) -> Outcome | None:
        if len(node.log) >= self._bound.decrees or node.split:
            return None
        turn = Turn(node.but(proposal=None), 0.0)
        intent, wanted = Intent.NOMINATE, None
        if node.log:
            assert node.nomination is not None
            if node.is_init:
                seal = Seal(ca_hash=node.id * 64, addresses=("https://10.0.0.1:6443",))
                intent, wanted = Intent.SEAL, seal
            else:
                intent, wanted = Intent.ABANDON, Abandon(reason=f"{node.id} waited")
        election.propose(turn, intent, wanted)
        return self._outcome(self._node(node), turn)

    def next(self, state: State) -> Iterator[State]:
        """All states that one step leads to."""
        messages, votes, _, crashes = state[3:]
        for i, node in enumerate(state[:3]):
            for outcome, used in self._inputs(state, i, node):
                self.steps += 1
                yield self._put(
                    state, i, outcome.node, messages | outcome.sent, votes, used, crashes
                )
                if crashes:
                    for left, sent in outcome.prefixes:
                        yield self._put(state, i, left, messages | sent, votes, used, crashes - 1)

    def _inputs(self, state: State, i: int, node: int) -> Iterator[tuple[Outcome, int]]:
        opened = state[5]
        for bit in _bits(state[3]):
            if (outcome := self._deliver(node, bit)) is not None:
                yield outcome, opened
        for teacher in state[:3]:
            if (outcome := self._learn(node, teacher)) is not None:
                yield outcome, opened
        shift = 4 * i + 2 * len(self._nodes[node].log)
        may_open = i in PROPOSERS and (opened >> shift) & 3 < self._bound.ballots
        if may_open and (outcome := self._propose(node)) is not None:
            yield outcome, opened + (1 << shift)

    def _put(
        self, state: State, i: int, node: int, messages: int, votes: int, opened: int, crashes: int
    ) -> State:
        """The state with one node changed, rid of what nobody can do anything with."""
        a, b, c = (node if j == i else state[j] for j in range(len(NODES)))
        three = (self._nodes[a], self._nodes[b], self._nodes[c])
        lowest = min(len(each.log) for each in three)
        for bit in _bits(messages):
            if self._dead(bit, three, opened):
                messages ^= 1 << bit
        votes |= self._vote_of[node]
        for bit in _bits(votes):
            if self._votes[bit][0] < lowest:
                votes ^= 1 << bit
        for j in PROPOSERS:
            opened &= ~((1 << (4 * j + 2 * len(three[j].log))) - (1 << 4 * j))
        return a, b, c, messages, votes, opened, crashes

    def _dead(self, bit: int, three: tuple[Node, ...], opened: int) -> bool:
        """Whether no receiver can do anything with a message, now or later.

        A log only grows and a promise only rises; an answer lives as long as its proposer has or
        may open another ballot, to which it must not be counted.
        """
        sender, to, message = self._messages[bit]
        assert isinstance(message, (Prepare, Accept, Promise, Accepted))
        if isinstance(message, (Prepare, Accept)):
            return all(
                len(node.log) > message.decree
                or (
                    len(node.log) == message.decree
                    and node.durable.acceptor.promised is not None
                    and node.durable.acceptor.promised > message.ballot
                )
                for number, node in enumerate(three)
                if number != sender
            )
        assert to is not None
        if len(three[to].log) > message.decree:
            return True
        if (opened >> (4 * to + 2 * message.decree)) & 3 < self._bound.ballots:
            return False
        proposal = three[to].proposal
        if proposal is None:
            return True
        return isinstance(message, Promise) and isinstance(proposal, Accepting)

    # --- what must hold ---------------------------------------------------------------------

    def check(self, state: State) -> None:
        """At most one value per entry has a quorum; what is learned is chosen."""
        nodes = [self._nodes[n] for n in state[:3]]
        voters: dict[tuple[int, Ballot], set[int]] = {}
        values: dict[tuple[int, Ballot], Value] = {}
        for bit in _bits(state[4]):
            decree, ballot, voter, value = self._votes[bit]
            voters.setdefault((decree, ballot), set()).add(voter)
            if values.setdefault((decree, ballot), value) != value:
                raise BrokenError(f"ballot {ballot.describe()} has two values")
        chosen = {
            decree: {
                values[d, b].describe()
                for (d, b), who in voters.items()
                if d == decree and len(who) * 2 > len(NODES)
            }
            for decree in range(self._bound.decrees)
        }
        lowest = min(len(node.log) for node in nodes)
        for decree, found in chosen.items():
            logs = {n.log[decree].describe() for n in nodes if len(n.log) > decree}
            if len(found | logs) > 1:
                raise BrokenError(f"entry {decree} is {' and '.join(sorted(found | logs))}")
            if decree >= lowest and logs - found:
                raise BrokenError(f"{logs} was learned as entry {decree}, which nobody chose")

    # --- the search -------------------------------------------------------------------------

    def run(self) -> tuple[int, set[str]]:
        """Visit all; how many states there are, and which ends were come to."""
        hellos = [own_hello(self._fresh(i, Durable(node=NODES[i]))) for i in range(len(NODES))]
        for i in range(len(NODES)):
            others = (hello for hello in hellos if hello.node != NODES[i])
            self._peers.append(
                {hello.node: Peer(hello=hello, up=True, heard_s=0.0) for hello in others}
            )
        first = [self._node(self._fresh(i, Durable(node=NODES[i]))) for i in range(len(NODES))]
        start = (first[0], first[1], first[2], 0, 0, 0, self._bound.crashes)
        seen, frontier, ends = {start}, [start], set[str]()
        while frontier:
            state = frontier.pop()
            for following in self.next(state):
                if following not in seen:
                    seen.add(following)
                    frontier.append(following)
                    ends |= self._look(following)
        return len(seen), ends

    def _look(self, state: State) -> set[str]:
        """Check a state, and say what its logs end with."""
        key = (state[0], state[1], state[2], state[4])
        if key in self._checked:
            return set()
        self._checked.add(key)
        self.check(state)
        logs = [self._nodes[n].log for n in state[:3]]
        return {type(log[-1]).__name__ for log in logs if log}


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        mask ^= low
        yield low.bit_length() - 1


def search(bound: Bound) -> str:
    """Visit all states within a bound; returns what was seen, raises BrokenError."""
    began = time.monotonic()
    keeps, guards.keeps_the_init_node = guards.keeps_the_init_node, lambda *_: None
    try:
        visitor = Search(bound)
        states, ends = visitor.run()
    finally:
        guards.keeps_the_init_node = keeps
    assert len(ends) == 2 * bound.decrees - 1, f"only {ends} were come to"
    return (
        f"{states:,} distinct states, {visitor.steps:,} steps, all of them kept the promise: "
        f"{bound.describe()} ({time.monotonic() - began:.0f} s)"
    )


def main() -> int:
    """Exit code 1 where a state must not be."""
    with multiprocessing.Pool(len(BOUNDS)) as pool:
        try:
            for line in pool.imap(search, BOUNDS):
                print(line, flush=True)
        except BrokenError as error:
            print(f"BROKEN: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
