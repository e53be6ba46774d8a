# SPDX-License-Identifier: Apache-2.0
"""Scenario files: a short text of steps and the exchange that must follow, in the manner of etcd
raft's interaction tests.

A file is a list of blocks: a command (a line or more), ``----``, and what happens. ``#`` starts a
comment. The nodes are real cores on a wire of memory; nothing moves but by a command:

- ``site a b c nodes=3 [servers=N]``: machines that are off; a rank is by place (a before b)
- ``on a b``, ``off a``: power; what was persisted stays, and whoever met a loses it
- ``meet a b c``: each of them hears of each other, and whether those are all
- ``part a b``: they lose each other
- ``deliver``: messages in flight and errands of root, until none is left; ``deliver a->b`` only
  those, once
- ``drop a->b``: messages in flight are lost; ``repeat a->b``: they will arrive twice
- ``wait 30s``: time passes for all, due ticks happen; ``go 30s``: and messages are delivered
- ``quietly …``: a command whose output is of no interest here
- ``apply a done|failed|late|hopeless``: root carried out the order of a; late: it failed after
  K3s was started
- ``ready a``: K3s on a is ready; ``disk a etcd CA|sqlite CA|none``: what root finds there
- ``image a ID``: the machine gets a new image: the same hardware, another identity
- ``role a server|agent|auto``: what is configured, from the next start on
- ``leave a drain|remove``: the operator takes it out of the cluster
- ``forget a``: its state file is lost; ``full a``, ``emptied a``: its disk takes nothing; again
- ``force a``: the operator decides; ``clone a``: another machine says that it is a
- ``status a``: its one line; ``notes a``: what it says should be mended
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from k3sagentd import store
from k3sagentd.core import machine, status
from k3sagentd.core.cluster import Errand, KubeNode
from k3sagentd.core.effects import Announce, Persist, Report, Send, WriteErrand, WriteOrder
from k3sagentd.core.events import (
    AddressChanged,
    ErrandEnded,
    Event,
    FactsRead,
    HelloReceived,
    InitForced,
    K3sProbed,
    LeaveAsked,
    MessageReceived,
    PeerLost,
    PersistFailed,
    PersistRecovered,
    ResultRead,
    Tick,
)
from k3sagentd.core.hello import k3s_role
from k3sagentd.core.k3s import (
    Datastore,
    Facts,
    K3sState,
    Order,
    Outcome,
    Result,
    ServerOrAgent,
)
from k3sagentd.core.messages import Hello, LeaveStep, Message
from k3sagentd.core.state import Durable, Node, Site
from k3sagentd.core.words import NodeId, Role
from tests.sim.kube import Kube
from tests.sim.promise import majority

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
KEY = b"33"
"""A key under which the lots of a, b, c, d, e fall in this order, so that texts read easily."""
QUIET = re.compile(r"announce |sees |lost ")
"""What is not shown: every change of state is announced, and ``meet`` says who sees whom."""


class ScenarioError(Exception):
    """A line that is not understood."""


@dataclass
class Machine:
    """One machine of a scenario."""

    id: NodeId
    site: Site
    durable: Durable
    facts: Facts
    node: Node | None = None
    starts: int = 0
    hello: Hello | None = None
    order: Order | None = None
    errand: Errand | None = None
    ready: bool = False
    met: set[NodeId] = field(default_factory=set)


@dataclass
class Block:
    """A command and its expected output."""

    comments: list[str]
    commands: list[str]
    expected: list[str]


def parse(text: str) -> Iterator[Block]:
    """The blocks of a file."""
    for part in re.split(r"\n{2,}", text.strip()):
        lines = part.splitlines()
        comments = [line for line in lines if line.startswith("#")]
        rest = [line for line in lines if not line.startswith("#")]
        if not rest:
            yield Block(comments, [], [])
            continue
        at = rest.index("----") if "----" in rest else len(rest)
        yield Block(comments, rest[:at], rest[at + 1 :])


def play(text: str) -> str:
    """The same file with the output that there is; AssertionError where the promise broke."""
    wire = Wire()
    parts = []
    for block in parse(text):
        lines = list(block.comments)
        if block.commands:
            lines += [*block.commands, "----"]
            for command in block.commands:
                wire.obey(command.split("#")[0].strip())
            lines += wire.shown() or ["ok"]
            wire.check()
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


class Wire:
    """Machines, what is in flight between them, and the time."""

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        self.flight: list[tuple[NodeId, NodeId, Message]] = []
        self.now_s = 0.0
        self._lines: list[tuple[str, str]] = []
        self._votes: dict[tuple[int, str, str], set[NodeId]] = {}
        self._kube = Kube(self._is_heard)

    def shown(self) -> list[str]:
        """What happened since the last look, one node after the other where it acted."""
        lines, last = [], None
        for who, text in self._lines:
            if who != last:
                lines.append(who)
            lines.append(f"  {text}")
            last = who
        self._lines.clear()
        return lines

    # --- commands ---------------------------------------------------------------------------

    def obey(self, command: str) -> None:
        """Carry out one command."""
        word, *arguments = command.split()
        found: Callable[..., None] | None = getattr(self, f"_{word}", None)
        if found is None:
            raise ScenarioError(f"no such command: {command}")
        found(*arguments)

    def _site(self, *words: str) -> None:
        settings = dict(word.split("=") for word in words if "=" in word)
        names = [word for word in words if "=" not in word]
        nodes = int(settings["nodes"])
        servers = int(settings.get("servers", 3 if nodes >= 3 else 1))
        for name in names:
            self._add(name, nodes, servers, Role(settings.get("role", "auto")))

    def _add(self, name: str, nodes: int, servers: int, role: Role) -> None:
        me = NodeId(name)
        site = Site(
            nodes=nodes,
            servers=servers,
            role=role,
            election_key=KEY,
            hostname=name,
            instance="",
            look_s=0.0,
            abandon_after_s=60.0,
            replace_after_s=300.0,
            hardware=f"hardware of {name}",
        )
        facts = Facts(fsync_ms=1.0)
        self.machines[name] = Machine(me, site, Durable(node=me), facts)

    def _on(self, *names: str) -> None:
        for name in names:
            m = self.machines[name]
            m.starts += 1
            site = Site(
                **{key: getattr(m.site, key) for key in Site.__slots__}
                | {"instance": f"{name}{m.starts}"}
            )
            m.node = machine.new_node(site, m.durable, self.now_s)
            m.met.clear()
            address = f"10.0.0.{ord(name[0]) - ord('a') + 1}"
            self._feed(m, FactsRead(now_s=self.now_s, facts=m.facts))
            self._feed(m, AddressChanged(now_s=self.now_s, address=address))

    def _off(self, *names: str) -> None:
        for name in names:
            m = self.machines[name]
            m.node, m.order, m.errand, m.ready = None, None, None, False
            m.met.clear()
            self.flight = [each for each in self.flight if m.id not in each[:2]]
            for other in self.machines.values():
                if m.id in other.met:
                    other.met.discard(m.id)
                    self._feed(other, PeerLost(now_s=self.now_s, peer=m.id))

    def _meet(self, *names: str) -> None:
        for a in names:
            for b in names:
                if a != b:
                    self.machines[a].met.add(self.machines[b].id)
        for a in names:
            for b in names:
                if a != b:
                    self._greet(self.machines[a], self.machines[b])

    def _part(self, *names: str) -> None:
        for a in names:
            for other in list(self.machines.values()):
                if other.id not in names:
                    continue
                m = self.machines[a]
                if other.id in m.met:
                    m.met.discard(other.id)
                    self._feed(m, PeerLost(now_s=self.now_s, peer=other.id))
        self.flight = [e for e in self.flight if not (e[0] in names and e[1] in names)]

    def _deliver(self, *links: str) -> None:
        if links:
            for link in links:
                for each in self._on_link(link):
                    self.flight.remove(each)
                    self._arrive(each)
            return
        for _ in range(1000):
            if self.flight:
                self._arrive(self.flight.pop(0))
            elif not self._root():
                return
        raise AssertionError("the messages never end")

    def _drop(self, *links: str) -> None:
        for link in links:
            for each in self._on_link(link):
                self.flight.remove(each)

    def _repeat(self, *links: str) -> None:
        for link in links:
            self.flight += self._on_link(link)

    def _on_link(self, link: str) -> list[tuple[NodeId, NodeId, Message]]:
        sender, _, to = link.partition("->")
        found = [e for e in self.flight if (e[0] == sender or sender == "*") and e[1] == to]
        if not found:
            raise ScenarioError(f"nothing is in flight on {link}")
        return found

    def _quietly(self, *words: str) -> None:
        before = len(self._lines)
        self.obey(" ".join(words))
        del self._lines[before:]

    def _go(self, span: str) -> None:
        self._wait(span, then=self._deliver)

    def _wait(self, span: str, then: Callable[[], None] = lambda: None) -> None:
        end_s = self.now_s + float(span.removesuffix("s"))
        while True:
            due = [
                (at_s, m)
                for m in self.machines.values()
                if m.node and (at_s := machine.deadline(m.node)) is not None and at_s <= end_s
            ]
            if not due:
                break
            at_s, m = min(due, key=lambda pair: pair[0])
            self.now_s = max(self.now_s, at_s)
            self._feed(m, Tick(now_s=self.now_s))
            then()
        self.now_s = end_s

    def _apply(self, name: str, how: str) -> None:
        m = self.machines[name]
        if m.order is None:
            raise ScenarioError(f"{name} has no order")
        words = {
            "done": Outcome.DONE,
            "failed": Outcome.FAILED,
            "late": Outcome.FAILED,
            "hopeless": Outcome.FAILED_FOR_GOOD,
        }
        reason = None if how == "done" else "the memory cgroup is off"
        result = Result(
            order=m.order,
            outcome=words[how],
            step="install",
            reason=reason,
            started=how == "late",
        )
        if how == "done" and m.order.action in ("stand-down", "step-down"):
            m.facts, m.ready = Facts(fsync_ms=1.0), False
        self._feed(m, FactsRead(now_s=self.now_s, facts=m.facts))
        self._feed(m, ResultRead(now_s=self.now_s, result=result))

    def _ready(self, name: str) -> None:
        m = self.machines[name]
        assert m.node is not None
        m.ready = True
        if k3s_role(m.node) is ServerOrAgent.AGENT:
            self._kube.register(m.id, m.site.hardware, server=False)
            state = K3sState(running=True, ready=True, detail="K3s is ready")
            self._feed(m, K3sProbed(now_s=self.now_s, state=state))
            return
        epoch = m.node.durable.started_epoch
        if m.node.seal is not None and m.facts.ca_hash is None and epoch is None:
            self._disk(name, "etcd", m.node.seal.ca_hash)
        ca_hash = m.facts.ca_hash or (name if epoch is None else f"{name}{epoch}") * 32
        if m.facts.datastore is Datastore.NONE:
            m.facts = Facts(
                fsync_ms=1.0,
                datastore=Datastore.ETCD,
                origin=epoch,
                origin_generation=m.node.durable.started_generation,
                origin_node=m.id,
                ca_hash=ca_hash,
            )
            self._feed(m, FactsRead(now_s=self.now_s, facts=m.facts))
        self._kube.register(m.id, m.site.hardware, server=True)
        state = K3sState(running=True, ready=True, ca_hash=ca_hash, detail="K3s is ready")
        self._feed(m, K3sProbed(now_s=self.now_s, state=state))

    def _disk(self, name: str, kind: str, ca: str = "") -> None:
        m = self.machines[name]
        ca_hash = ca * 64 if len(ca) == 1 else ca
        m.facts = Facts(fsync_ms=1.0, datastore=Datastore(kind), ca_hash=ca_hash or None)
        if m.node is not None:
            self._feed(m, FactsRead(now_s=self.now_s, facts=m.facts))

    def _forget(self, name: str) -> None:
        m = self.machines[name]
        m.durable, _ = store.restore(None, m.id)

    def _full(self, name: str) -> None:
        reason = "No space left on device"
        self._feed(self.machines[name], PersistFailed(now_s=self.now_s, reason=reason))

    def _emptied(self, name: str) -> None:
        self._feed(self.machines[name], PersistRecovered(now_s=self.now_s))

    def _force(self, name: str) -> None:
        self._feed(self.machines[name], InitForced(now_s=self.now_s))

    def _root(self) -> bool:
        """One errand is done, if one was asked."""
        for m in self.machines.values():
            if m.errand is not None and m.node is not None:
                result, m.errand = self._kube.do(m.errand), None
                self._feed(m, ErrandEnded(now_s=self.now_s, result=result))
                return True
        return False

    def _is_heard(self, kube: KubeNode) -> bool:
        return any(m.ready and m.id == kube.node and m.node for m in self.machines.values())

    def _image(self, name: str, identity: str) -> None:
        m = self.machines[name]
        me = NodeId(identity)
        self.machines[identity] = Machine(me, m.site, Durable(node=me), Facts(fsync_ms=1.0))
        del self.machines[name]

    def _role(self, name: str, role: str) -> None:
        m = self.machines[name]
        m.site = replace(m.site, role=Role(role))

    def _leave(self, name: str, step: str) -> None:
        self._feed(self.machines[name], LeaveAsked(now_s=self.now_s, step=LeaveStep(step)))

    def _clone(self, name: str) -> None:
        m = self.machines[name]
        assert m.hello is not None
        hello = replace(m.hello, instance="another", address="10.0.0.99")
        self._feed(m, HelloReceived(now_s=self.now_s, hello=hello))

    def _status(self, name: str) -> None:
        m = self.machines[name]
        assert m.node is not None
        line = status.waiting_for(m.node, self.now_s)
        text = f"{m.node.phase}: waits for {line}" if line else f"{m.node.phase}"
        if (leaving := m.node.leaving) is not None:
            how = "done" if leaving.done else leaving.refused or f"waits for {leaving.told}"
            text += f"; {leaving.step}: {how}"
        self._lines.append((name, text))

    def _notes(self, name: str) -> None:
        m = self.machines[name]
        assert m.node is not None
        self._lines += [(name, each) for each in status.notes(m.node, self.now_s)]

    # --- what follows -----------------------------------------------------------------------

    def _arrive(self, each: tuple[NodeId, NodeId, Message]) -> None:
        sender, to, message = each
        m = self.machines[to]
        if m.node is not None:
            self._feed(m, MessageReceived(now_s=self.now_s, sender=sender, message=message))

    def _greet(self, here: Machine, there: Machine) -> None:
        if there.id in here.met and here.node is not None and there.hello is not None:
            self._feed(here, HelloReceived(now_s=self.now_s, hello=there.hello))

    def _feed(self, m: Machine, event: Event) -> None:
        assert m.node is not None, f"{m.id} is off"
        m.node, effects = machine.step(m.node, event)
        for effect in effects:
            text = effect.describe()
            if not QUIET.match(text):
                self._lines.append((m.id, text))
            match effect:
                case Persist(durable=durable):
                    m.durable = durable
                    self._count(durable)
                case Send(to=to, message=message):
                    self.flight.append((m.id, to, message))
                case WriteOrder(order=order):
                    m.order = order
                case WriteErrand(errand=errand):
                    m.errand = errand
                case Announce(hello=hello):
                    m.hello = hello
                case Report():
                    pass
        if any(isinstance(effect, Announce) for effect in effects):
            for other in self.machines.values():
                if other.id in m.met:
                    self._greet(other, m)

    # --- the promise ------------------------------------------------------------------------

    def _count(self, durable: Durable) -> None:
        accepted = durable.acceptor.accepted
        if accepted is not None:
            key = (len(durable.log), accepted.ballot.describe(), accepted.value.describe())
            self._votes.setdefault(key, set()).add(durable.node)

    def check(self) -> None:
        """One value per entry, and of any two logs one begins with the other."""
        chosen: dict[int, str] = {}
        for (decree, _, value), voters in self._votes.items():
            nodes = next(iter(self.machines.values())).site.nodes
            if len(voters) >= majority(nodes):
                assert chosen.setdefault(decree, value) == value, f"two values at {decree}"
        newest = max(m.durable.generation for m in self.machines.values())
        follow = [m.durable for m in self.machines.values() if m.durable.generation == newest]
        logs = sorted((durable.log for durable in follow), key=len)
        for shorter, longer in itertools.pairwise(logs):
            assert longer[: len(shorter)] == shorter, "logs differ"


def main() -> int:
    """``--rewrite``: put the output that there is into every file, for review."""
    for path in FILES:
        before = path.read_text()
        try:
            after = play(before)
        except AssertionError as error:
            print(f"{path.name}: the promise broke: {error}")
            return 1
        if after != before:
            print(f"{path.name} is another now")
            if "--rewrite" in sys.argv:
                path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
