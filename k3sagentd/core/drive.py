# SPDX-License-Identifier: Apache-2.0
"""What this machine's K3s is ordered to be, and when: init, prepare, join, stand down.

The order of things is the promise: nothing before ``nominate`` is chosen, nothing on other nodes
before ``seal`` is, servers one after the other (design, 4.3 and 4.5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from k3sagentd.core import guards, log
from k3sagentd.core.effects import WriteOrder
from k3sagentd.core.hello import fixed_urls, k3s_role, own_url
from k3sagentd.core.k3s import Action, Datastore, Order, Outcome, Result, ServerOrAgent
from k3sagentd.core.log import Seal
from k3sagentd.core.messages import Hello, Registration, RegistrationRequest
from k3sagentd.core.state import Drive, Node
from k3sagentd.core.turn import Turn
from k3sagentd.core.words import NodeId, NodePhase

RETRY_S = 5.0
RETRY_LIMIT_S = 300.0
"""Between attempts: 5 s as K3s's own unit (RestartSec), doubled up to five minutes."""
FOR_GOOD_RETRY_S = 300.0
"""What needs a person is looked at again now and then, so that nobody has to tell us."""
ORDER_TIMEOUT_S = 3600.0
"""After this an order without an end was lost with the process that had taken it: twice what an
install may take."""
ASK_S = 3.0
"""Before another peer is asked for the registration."""
COMMON_HOSTNAMES = frozenset({"raspberrypi", "localhost", "debian", "ubuntu", "dietpi", "armbian"})
"""Names that images come with: never used alone as K3s's node name."""
SERVERS_LIMIT = 16
"""Registration addresses in one answer or order."""


# --- what the site needs of this node -------------------------------------------------------


def started_epoch(node: Node) -> int | None:
    """The epoch in which we were to start the cluster: as we know it, or as its data says.

    An identity that lost its state may still have the data.
    """
    if node.durable.started_epoch is not None or node.facts is None:
        return node.durable.started_epoch
    return node.facts.origin


def must_stand_down(node: Node) -> bool:
    """Whether the epoch in which we were to start the cluster was abandoned."""
    started = started_epoch(node)
    return started is not None and log.is_abandoned(node.log, started)


def init_failure(node: Node, now_s: float) -> str | None:
    """Why this init node will not make the cluster; None while there is hope."""
    drive = node.drive
    if elsewhere := guards.cluster_elsewhere(node):
        return elsewhere
    if node.k3s.ready or drive.order is None or drive.order.action is not Action.INIT:
        return None
    reason = drive.result.reason if drive.result else None
    if drive.outcome is Outcome.FAILED_FOR_GOOD:
        return reason or "the install failed"
    if drive.first_order_s is not None and now_s >= drive.first_order_s + node.site.abandon_after_s:
        return reason or f"K3s is not ready after {node.site.abandon_after_s:.0f} s"
    return None


def own_seal(node: Node) -> Seal | None:
    """The seal that this init node may propose: its server is ready."""
    order = node.drive.order
    if order is None or order.action is not Action.INIT or node.drive.outcome is not Outcome.DONE:
        return None
    url = own_url(node)
    if not node.k3s.ready or node.k3s.ca_hash is None or url is None:
        return None
    return Seal(
        ca_hash=node.k3s.ca_hash,
        addresses=(*fixed_urls(node), url),
        k3s_version=node.k3s.version,
        shared_flags=node.facts.shared_flags if node.facts else {},
    )


def flag_mismatch(node: Node) -> str | None:
    """A flag that all servers must share and that is set differently here (K3S.md 4)."""
    if node.seal is None or node.facts is None or node.is_init:
        return None
    theirs = node.seal.shared_flags
    wrong = [
        f"{flag} is {value} here but {theirs.get(flag, 'not set')} in the cluster"
        for flag, value in sorted(node.facts.shared_flags.items())
        if theirs.get(flag) != value
    ]
    return "; ".join(wrong) + "; set the same value on both" if wrong else None


def is_member(node: Node) -> bool:
    """Whether this machine's K3s data belongs to the sealed cluster: it only needs starting."""
    facts, seal = node.facts, node.seal
    if facts is None or seal is None:
        return False
    if node.k3s.ready and node.k3s.ca_hash == seal.ca_hash:
        return True
    if facts.datastore is Datastore.ETCD:
        return facts.ca_hash == seal.ca_hash
    return facts.datastore is Datastore.AGENT and facts.ca_hash in (None, seal.ca_hash)


def join_barrier(node: Node) -> str | None:
    """What a server that is prepared waits for before it may join; None when it is its turn."""
    nomination = node.nomination
    if nomination is None or k3s_role(node) is not ServerOrAgent.SERVER:
        return None
    heard = {hello.node: hello for hello in node.up}
    founders = nomination.servers
    turn = founders.index(node.id) if node.id in founders else len(founders)
    unprepared = [f for f in founders if f != node.id and not _prepared(heard.get(f))]
    if unprepared:
        return f"{_names(node, unprepared)} to be prepared (servers join when all are)"
    unready = [f for f in founders[:turn] if heard[f].server_url is None]
    return f"server {_names(node, unready[:1])} to be ready first" if unready else None


def _prepared(hello: Hello | None) -> bool:
    return hello is not None and (hello.prepared or hello.server_url is not None)


def _names(node: Node, ids: list[NodeId]) -> str:
    return ", ".join(node.name_of(each) for each in ids)


# --- orders ---------------------------------------------------------------------------------


def run(turn: Turn) -> None:
    """Give the order that the phase calls for, if it was not given yet or is due again."""
    node = turn.node
    if node.facts is None or node.address is None:
        return
    match node.phase:
        case NodePhase.INITIALISING if may_initialise(node):
            _ensure(turn, Action.INIT)
        case NodePhase.STANDING_DOWN:
            _ensure(turn, Action.STAND_DOWN)
        case NodePhase.JOINING:
            _join(turn)
        case NodePhase.READY:
            _settle_in(turn)


def may_initialise(node: Node) -> bool:
    """Whether the init node may (again) be started: with a quorum that knows nothing newer.

    To seal it needs the quorum anyway; and whoever was away may have been abandoned meanwhile.
    """
    if not node.is_init or guards.cluster_elsewhere(node) is not None:
        return False
    if node.durable.forced:
        return True
    newer = any(hello.log_length > len(node.log) for hello in node.up)
    return node.seen >= node.quorum and not newer


def _join(turn: Turn) -> None:
    node = turn.node
    if is_member(node):
        if node.is_init and not _other_servers(node):
            _ensure(turn, Action.INIT)
        else:
            _ensure(turn, Action.JOIN)
        return
    if k3s_role(node) is ServerOrAgent.SERVER and not node.drive.prepared:
        _ensure(turn, Action.PREPARE)
        return
    if join_barrier(node) is None or _ordered(node, Action.JOIN):
        if node.drive.registration is None:
            _ask(turn)
        else:
            _ensure(turn, Action.JOIN)


def _settle_in(turn: Turn) -> None:
    """Once other servers are ready, the init node is told to follow them like any other.

    Else its ``cluster-init`` would found a second cluster if its data were ever lost. And what of
    an order is still to do while K3s is ready is tried again, like any other.
    """
    node = turn.node
    if node.is_init and _other_servers(node):
        _ensure(turn, Action.JOIN)
    elif node.drive.order is not None and node.drive.retry_at_s is not None:
        _ensure(turn, node.drive.order.action)


def _ordered(node: Node, action: Action) -> bool:
    return node.drive.order is not None and node.drive.order.action is action


def _ensure(turn: Turn, action: Action) -> None:
    drive = turn.node.drive
    if _ordered(turn.node, action):
        due_s = order_due_s(drive)
        if due_s is None or turn.now_s < due_s:
            return
        attempt = drive.order.attempt + 1 if drive.order else 0
    else:
        attempt = 0
        turn.drive(first_order_s=turn.now_s)
    _remember(turn, action)
    order = replace(_order(turn.node, action), attempt=attempt)
    turn.drive(
        order=order, outcome=Outcome.RUNNING, result=None, retry_at_s=None, ordered_s=turn.now_s
    )
    turn.effects.append(WriteOrder(order=order))


def order_due_s(drive: Drive) -> float | None:
    """When the order that stands is given again, as a new attempt; None: it is done."""
    if drive.retry_at_s is None and drive.order is not None and drive.outcome is Outcome.RUNNING:
        return drive.ordered_s + ORDER_TIMEOUT_S
    return drive.retry_at_s


def _remember(turn: Turn, action: Action) -> None:
    """Make durable what must be known after a power cut that follows the order."""
    durable = turn.node.durable
    name = durable.node_name or choose_name(turn.node)
    epoch = durable.started_epoch
    if action is Action.INIT:
        epoch = log.epoch(turn.node.log)
    if (name, epoch) != (durable.node_name, durable.started_epoch):
        turn.persist(node_name=name, started_epoch=epoch)


def choose_name(node: Node) -> str:
    """K3s's name for this node: the hostname, made unique where others have or may have it."""
    hostname = node.site.hostname
    if guards.existing_cluster(node) is not None:
        return hostname
    taken = {
        name for peer in node.peers.values() for name in (peer.hello.hostname, peer.hello.node_name)
    }
    if hostname in taken or hostname in COMMON_HOSTNAMES:
        return f"{hostname[:54].rstrip('-')}-{node.id[:8]}"
    return hostname


def _order(node: Node, action: Action) -> Order:
    epoch = log.epoch(node.log)
    if action is Action.STAND_DOWN:
        epoch = started_epoch(node) or 0
    servers: tuple[str, ...] = ()
    flags: Mapping[str, str] = {}
    if action is Action.JOIN and node.seal is not None:
        known = node.drive.registration.servers if node.drive.registration else ()
        urls = (*fixed_urls(node), *(_other_servers(node) or known or node.seal.addresses))
        servers = tuple(u for u in dict.fromkeys(urls) if u != own_url(node))[:SERVERS_LIMIT]
        flags = node.seal.shared_flags
    return Order(
        action=action,
        epoch=epoch,
        role=k3s_role(node) or ServerOrAgent.SERVER,
        node_name=node.durable.node_name or node.site.hostname,
        servers=servers or (node.seal.addresses if action is Action.JOIN and node.seal else ()),
        ca_hash=node.seal.ca_hash if node.seal else None,
        k3s_version=node.seal.k3s_version if node.seal else None,
        shared_flags=flags,
        instance=node.site.instance,
    )


def on_result(turn: Turn, result: Result) -> None:
    """Take in what ``apply`` says of the order that stands; of another order it means nothing."""
    drive = turn.node.drive
    if drive.order is None or result.order != drive.order or drive.result == result:
        return
    retry_at_s = None
    if result.outcome is Outcome.FAILED:
        retry_at_s = turn.now_s + min(RETRY_LIMIT_S, RETRY_S * 2 ** min(drive.order.attempt, 6))
    elif result.outcome is Outcome.FAILED_FOR_GOOD:
        retry_at_s = turn.now_s + FOR_GOOD_RETRY_S
    prepared = drive.prepared or (
        result.outcome is Outcome.DONE and drive.order.action in (Action.PREPARE, Action.JOIN)
    )
    turn.drive(outcome=result.outcome, result=result, retry_at_s=retry_at_s, prepared=prepared)
    if retry_at_s is not None:
        turn.drive(registration=None, asked_s=float("-inf"))
        turn.report(f"{drive.order.action} failed at «{result.step}»: {result.reason}")
    elif result.outcome is Outcome.DONE:
        turn.report(f"{drive.order.action} is done")
    else:
        turn.report(f"{drive.order.action}: {result.step}")


def reset(turn: Turn) -> None:
    """Forget orders of an epoch that is over."""
    turn.set(drive=Drive())


# --- registration ---------------------------------------------------------------------------


def _ask(turn: Turn) -> None:
    """Ask one sealed peer where to join; the next one when it does not answer in time."""
    node = turn.node
    if turn.now_s < node.drive.asked_s + ASK_S:  # as in machine.deadline, to the last bit
        return
    sealed = [h.node for h in node.up if h.log_length >= len(node.log)]
    if not sealed:
        return
    order = spread(node.id, sealed)
    asked = node.drive.asked
    after = order.index(asked) + 1 if asked in order else 0
    peer = order[after % len(order)]
    turn.drive(asked_s=turn.now_s, asked=peer)
    role = k3s_role(node) or ServerOrAgent.AGENT
    turn.send(peer, RegistrationRequest(role=role))


def spread(joiner: NodeId, choices: list[NodeId]) -> list[NodeId]:
    """Rendezvous hashing (Thaler and Ravishankar 1998): each joiner has its own order, and the
    joiners of one that went away are shared out among all others."""

    def weight(choice: str) -> bytes:
        return hashlib.sha256(f"{joiner}:{choice}".encode()).digest()

    return sorted(choices, key=weight, reverse=True)


def registration(node: Node, joiner: NodeId, role: ServerOrAgent) -> Registration | None:
    """What a node of a sealed site hands to one that joins; None before the seal."""
    seal = node.seal
    if seal is None:
        return None
    ready = {h.node: h.server_url for h in node.up if h.server_url and h.node != joiner}
    own = own_url(node)
    if node.k3s.ready and k3s_role(node) is ServerOrAgent.SERVER and own and joiner != node.id:
        ready[node.id] = own
    urls = [ready[each] for each in spread(joiner, list(ready))] or seal.addresses
    return Registration(
        servers=tuple(dict.fromkeys((*fixed_urls(node), *urls)))[:SERVERS_LIMIT],
        ca_hash=seal.ca_hash,
        k3s_version=seal.k3s_version,
        shared_flags=seal.shared_flags,
        role=role,
    )


def on_registration(turn: Turn, message: Registration) -> None:
    """Take a registration that is of the cluster we know to be sealed."""
    seal = turn.node.seal
    if turn.node.phase is not NodePhase.JOINING or seal is None:
        return
    if message.ca_hash == seal.ca_hash and message.servers:
        turn.drive(registration=message)


def _other_servers(node: Node) -> tuple[str, ...]:
    ready = {h.node: h.server_url for h in node.up if h.server_url}
    return tuple(ready[each] for each in spread(node.id, list(ready)))
