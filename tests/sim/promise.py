# SPDX-License-Identifier: Apache-2.0
"""The promise as invariants, each checked at the very effect that could break it.

What the witness knows of the site it takes from the disks and the wire alone, never from the
core's own bookkeeping, so that a core that deceives itself does not deceive it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from k3sagentd.core import log as entries
from k3sagentd.core import messages
from k3sagentd.core.cluster import KubeNode, Roster
from k3sagentd.core.k3s import Action, Datastore, Order
from k3sagentd.core.log import Abandon, Nominate, Seal, Value
from k3sagentd.core.messages import Accept, Accepted, Hello, Learned, Message, Prepare
from k3sagentd.core.paxos import Ballot
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId
from tests.sim.computer import Computer

if TYPE_CHECKING:
    from tests.sim.world import World


def majority(nodes: int) -> int:
    """More than half, counted here anew: the core's own quorum is among what is checked."""
    return nodes // 2 + 1


class BrokenError(AssertionError):
    """An invariant does not hold; ``invariant`` is its name."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


class Promise:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.outside: str | None = None
        """Why the assumptions of the design do not hold in this run, if so."""
        self.chosen: dict[int, Value] = {}
        """Of generation 0, which is voted for."""
        self.entered: dict[tuple[entries.Generation, int], Value] = {}
        """By the nodes that an operator forced."""
        self.rosters: dict[tuple[str, int], Roster] = {}
        self.founded: dict[str, tuple[NodeId, int]] = {}
        self.forced_on: dict[tuple[int, NodeId], str] = {}
        """Which machine founded a cluster by a forced start."""
        self.joined: dict[str, set[NodeId]] = {}
        self._votes: dict[tuple[int, Ballot, int], set[NodeId]] = {}
        self._asked: dict[tuple[int, Ballot], Value] = {}
        self._disks: dict[tuple[int, NodeId], Durable] = {}
        self._voters: dict[tuple[int, NodeId], int] = {}
        """Who voted or still may, with the ``nodes`` that it counts by."""

    def _must(self, holds: bool, invariant: str, text: str) -> None:
        if not holds:
            raise BrokenError(invariant, text)

    def _agreed(self, holds: bool, invariant: str, text: str) -> None:
        """Like ``_must``, for what rests on the design's assumptions (4.3)."""
        if not holds and self.outside is None:
            raise BrokenError(invariant, text)

    # --- the assumptions --------------------------------------------------------------------

    def boots(self, m: Computer, durable: Durable) -> None:
        """A daemon starts: does every quorum still share a member with every other?

        Counted are the identities that voted or may vote, once per machine. Where too few of them
        are without a seal to form a quorum, nothing more can be decided.
        """
        if durable.muted is not None:
            self._disks[m.number, m.id] = durable
        else:
            self.persists(m, durable)  # a write that a power cut interrupted counts if it is there
            counts_by = durable.nodes if durable.nodes is not None else m.plan.nodes
            self._voters[m.number, m.id] = counts_by
        if self.outside is None:
            self.outside = self._exposed()

    def _exposed(self) -> str | None:
        voters = {key: nodes for key, nodes in self._voters.items() if self._counts(*key)}
        size, still_open = Counter(voters.values()), Counter[int]()
        for (number, node), nodes in voters.items():
            m = self.world.computers[number]
            left = m.disk.outcomes[-1]
            if m.id == node and left is not None and entries.seal_of(left.log) is None:
                still_open[nodes] += left.muted is None
        for a, b in itertools.product(size, size):
            if a == b and 2 * majority(a) <= size[a] and still_open[a] >= majority(a):
                return f"{size[a]} identities may vote, nodes is {a}: two quorums need not meet"
            if a != b and size[a] >= majority(a) and still_open[b] >= majority(b):
                return f"{size[a]} machines with nodes: {a}, {size[b]} with {b}: two quorums"
        return None

    def _counts(self, number: int, node: NodeId) -> bool:
        if self.world.computers[number].id == node:
            return True
        # A former identity of a machine that was re-imaged counts if it ever voted.
        left = self._disks.get((number, node))
        return left is not None and left.nodes is not None

    # --- the disk ---------------------------------------------------------------------------

    def persists(self, m: Computer, new: Durable) -> None:
        """A write is complete."""
        old = self._disks.get((m.number, m.id))
        if old is not None and self.outside is None:
            self._only_forward(m, old, new)
        self._disks[m.number, m.id] = new
        if new.generation.number:
            for number, value in enumerate(new.log):
                self._entered(m, new.generation, number, value)
            return
        for number in range(len(old.log) if old else 0, len(new.log)):
            if new.nodes == 1:
                self._choose(m, number, new.log[number])  # its vote and this are one write
            self._learned(m, number, new.log[number])
        proposal = new.acceptor.accepted
        if proposal is None or new.nodes is None:
            return
        decree = len(new.log)
        votes = self._votes.setdefault((decree, proposal.ballot, new.nodes), set())
        if m.id not in votes:
            votes.add(m.id)
            self._one_value_per_ballot(m, decree, proposal.ballot, proposal.value)
            self._what_is_there_wins(m, proposal.value)
            if len(votes) >= majority(new.nodes):
                self._choose(m, decree, proposal.value)

    def _only_forward(self, m: Computer, old: Durable, new: Durable) -> None:
        name = "an acceptor forgets nothing"
        self._must(new.generation >= old.generation, name, f"{m.name} goes back a generation")
        if new.generation > old.generation:
            forced = new.generation.by == m.id
            self._must(
                forced or m.k3s.store is Datastore.NONE,
                "who has data follows no other start",
                f"{m.name} follows {new.generation.describe()}",
            )
            return
        kept = old.roster is None or (
            new.roster is not None and new.roster.revision >= old.roster.revision
        )
        self._must(kept, name, f"{m.name} took an older roster")
        self._must(new.log[: len(old.log)] == old.log, name, f"{m.name} lost entries")
        self._must(not old.muted or bool(new.muted), name, f"{m.name} forgot that it is muted")
        self._must(old.nodes in (None, new.nodes), name, f"{m.name} changed its nodes")
        if len(new.log) == len(old.log) and old.acceptor.promised is not None:
            now, before = new.acceptor, old.acceptor
            self._must(
                now.promised is not None and now.promised >= before.promised,
                name,
                f"{m.name} took its promise back",
            )
            kept = before.accepted is None or (
                now.accepted is not None and now.accepted.ballot >= before.accepted.ballot
            )
            self._must(kept, name, f"{m.name} took its vote back")

    def _entered(
        self, m: Computer, generation: entries.Generation, number: int, value: Value
    ) -> None:
        known = self.entered.get((generation, number))
        if known is None:
            self._must(
                generation.by == m.id, "only who is forced decides alone", f"{m.name} does as well"
            )
            self.entered[generation, number] = value
        else:
            self._must(
                known == value, "a forced start has one log", f"{m.name} has {value.describe()}"
            )

    def _choose(self, m: Computer, decree: int, value: Value) -> None:
        known = self.chosen.setdefault(decree, value)
        self._agreed(
            known == value,
            "one value is chosen per entry",
            f"entry {decree} is {known.describe()} and, with {m.name}'s vote, {value.describe()}",
        )

    def _what_is_there_wins(self, m: Computer, value: Value) -> None:
        if not isinstance(value, Nominate) or m.id == value.init:
            return
        init = next((c for c in self.world.computers if c.id == value.init), None)
        there = m.k3s.cluster if m.k3s.was_there else None
        self._must(
            there is None or (init is not None and init.k3s.cluster == there),
            "what is on the disk wins",
            f"{m.name} has a cluster and votes for {value.describe()}",
        )

    def _learned(self, m: Computer, number: int, value: Value) -> None:
        self._agreed(
            self.chosen.get(number) == value,
            "only what was chosen is learned",
            f"{m.name} has {value.describe()} as entry {number}, chosen is "
            f"{self.chosen[number].describe() if number in self.chosen else 'nothing'}",
        )

    def _one_value_per_ballot(self, m: Computer, decree: int, ballot: Ballot, value: Value) -> None:
        known = self._asked.setdefault((decree, ballot), value)
        self._agreed(
            known == value,
            "a ballot has one value",
            f"ballot {ballot.describe()} of entry {decree} by {m.name}: {known.describe()} and "
            f"{value.describe()}",
        )

    # --- the wire ---------------------------------------------------------------------------

    def sends(self, m: Computer, message: Message) -> None:
        """A message leaves: would a power cut now leave enough on the disk to stand by it?"""
        for left in m.disk.outcomes:
            stands = left is not None and _stands_by(left, message)
            self._must(
                stands,
                "persisted before sent",
                f"{m.name} sends {message.describe()}, a power cut may leave "
                f"{left.describe() if left else 'a torn file'}",
            )
        if isinstance(message, (messages.Promise, Accepted)) and m.disk.outcomes[-1] is not None:
            self._must(
                m.disk.outcomes[-1].muted is None,
                "who lost its votes never votes",
                f"{m.name} sends {message.describe()}",
            )
        if isinstance(message, Accept):
            self._one_value_per_ballot(m, message.decree, message.ballot, message.value)

    def announces(self, m: Computer, hello: Hello) -> None:
        """What a node tells of itself is on its disk."""
        for left in m.disk.outcomes:
            stands = left is not None and len(left.log) >= hello.log_length
            self._must(stands, "persisted before sent", f"{m.name} announces more than it has")
            voted = left is not None and (left.log or not left.acceptor.blank)
            if hello.has_voted:
                self._must(bool(voted), "persisted before sent", f"{m.name} announces a vote")

    # --- K3s --------------------------------------------------------------------------------

    def orders(self, m: Computer, order: Order) -> None:
        """An order follows from the log that is on the disk."""
        left = m.disk.outcomes[-1]
        log = left.log if left else ()
        nomination, seal = entries.nomination_of(log), entries.seal_of(log)
        match order.action:
            case Action.INIT:
                holds = nomination is not None and nomination.init == m.id
                started = left and (left.started_generation, left.started_epoch)
                holds = holds and started == (order.generation, order.epoch)
            case Action.STEP_DOWN:
                listed = left.roster.servers if left and left.roster else (m.id,)
                holds = seal is not None and m.id not in listed
            case Action.PREPARE | Action.JOIN:
                holds = seal is not None and order.ca_hash == seal.ca_hash
            case _:
                outcome = 2 * order.epoch + 1
                holds = outcome < len(log) and isinstance(log[outcome], Abandon)
        self._must(holds, "an order follows from the log", f"{m.name} orders {order.describe()}")

    def starts_k3s(self, m: Computer, order: Order) -> None:
        """K3s is about to be started by an order."""
        sealed = bool(self._sealed())
        if order.action is Action.JOIN:
            self._agreed(
                sealed, "nobody joins before the seal", f"{m.name} starts K3s without a seal"
            )
            return
        if order.generation:
            return  # checked as the order was given
        nomination = self.chosen.get(2 * order.epoch)
        self._agreed(
            isinstance(nomination, Nominate) and nomination.init == m.id,
            "only the init node initialises",
            f"{m.name} starts K3s in epoch {order.epoch}",
        )
        left = m.disk.outcomes[-1]
        outcome = 2 * order.epoch + 1
        abandoned = left is not None and len(left.log) > outcome
        abandoned = abandoned and isinstance(left.log[outcome], Abandon)
        self._agreed(
            not abandoned or m.applying,
            "an abandoned init node does not initialise",
            f"{m.name} in epoch {order.epoch}",
        )

    def founds(self, m: Computer, cluster: str, generation: int, epoch: int) -> None:
        """A cluster came to be."""
        self.founded[cluster] = (m.id, epoch)
        if generation:
            first = self.forced_on.setdefault((generation, m.id), m.name)
            self._agreed(first == m.name, "a forced start has one cluster", f"{m.name} founds too")
            return
        outcome = self.chosen.get(2 * epoch + 1)
        self._agreed(
            not isinstance(outcome, Seal),
            "a sealed epoch has one cluster",
            f"{m.name} founds another in epoch {epoch}",
        )

    def joins(self, m: Computer, cluster: str) -> None:
        """A machine became a member of a cluster."""
        self.joined.setdefault(cluster, set()).add(m.id)
        self._agreed(
            len(self.joined) == 1, "never two clusters", f"{m.name} joins {cluster[:8]} too"
        )
        known = cluster in self._sealed()
        self._agreed(known, "never two clusters", f"{m.name} joins what is not sealed")

    def _sealed(self) -> set[str]:
        values = (*self.chosen.values(), *self.entered.values())
        return {value.ca_hash for value in values if isinstance(value, Seal)}

    def forced(self) -> None:
        """An operator gave the old cluster up: from here on there must be one other."""
        self.joined.clear()

    # --- the cluster's API ------------------------------------------------------------------

    def writes_roster(self, m: Computer, cluster: str, old: Roster | None, new: Roster) -> None:
        """The Lease's holder says who is to be a server."""
        before = old.revision if old is not None else 0
        self._must(new.revision > before, "rosters go forward", f"{m.name}: {new.describe()}")
        known = self.rosters.setdefault((cluster, new.revision), new)
        self._must(known == new, "one roster for a revision", f"{m.name}: {new.describe()}")
        takes_over = old is None or bool(set(new.servers) - set(old.servers))
        self._must(
            len(new.servers) % 2 == 1 or takes_over,
            "the servers are odd",
            f"{m.name}: {new.describe()}",
        )
        self._must(bool(new.servers), "a cluster keeps a server", f"{m.name} lists none")

    def removes_node(self, m: Computer, cluster: str, kube: KubeNode) -> None:
        """A Node is deleted, and its member with it."""
        if not kube.server:
            return
        members = self.world.clusters[cluster].members
        left = {each for each in members if not each.startswith(f"{kube.name}/")}
        alive = [
            c
            for c in self.world.computers
            if c.k3s.member in left and c.k3s.ready and (c is m or self.world.network.wired(c, m))
        ]
        self._must(
            len(alive) >= majority(len(left)),
            "a removal leaves a quorum",
            f"{m.name} removes {kube.name}: {len(alive)} of {len(left)} are left",
        )

    def steps_down(self, m: Computer, cluster: str) -> None:
        """A server's data goes aside because others are the servers now."""
        self._agreed(
            cluster in self._sealed(), "only our own data is moved", f"{m.name} steps down"
        )

    def stands_down(self, m: Computer, cluster: str) -> None:
        """Data of a cluster is moved aside."""
        self._agreed(
            cluster not in self._sealed(), "a sealed cluster is never stood down", f"{m.name} does"
        )
        self._must(
            cluster in self.founded, "only our own data is moved", f"{m.name} moves {cluster[:8]}"
        )
        members = self.joined.get(cluster)
        self._agreed(not members, "an abandoned cluster has no members", f"{members} joined it")

    def nothing_is_deleted(self) -> None:
        """Whatever K3s data there was is in its place or aside."""
        there = {c.k3s.cluster for c in self.world.computers}
        there |= {cluster for c in self.world.computers for cluster in c.k3s.aside}
        there |= {cluster for _, cluster in self.taken}
        lost = set(self.founded) - there
        self._must(not lost, "nothing of K3s's is deleted", f"{lost} are gone")

    taken: tuple[tuple[int, str], ...] = ()
    """Data that went with a machine: re-imaged by a person."""


def _stands_by(left: Durable, message: Message) -> bool:
    match message:
        case Prepare(decree=decree, ballot=ballot) | messages.Promise(decree=decree, ballot=ballot):
            promised = left.acceptor.promised
            if len(left.log) > decree:
                return True
            return len(left.log) == decree and promised is not None and promised >= ballot
        case Accept(decree=decree, ballot=ballot) | Accepted(decree=decree, ballot=ballot):
            accepted = left.acceptor.accepted
            if len(left.log) > decree:
                return True
            return len(left.log) == decree and accepted is not None and accepted.ballot >= ballot
        case Learned(first=first, entries=values, generation=generation):
            return left.generation == generation and left.log[first : first + len(values)] == values
    return True
