# SPDX-License-Identifier: Apache-2.0
"""When a node must not vote, must not propose, or is in conflict; each as a reason in one line.

Every function answers None for "go on". The rules are those of the design, sections 3 and 4.
"""

from __future__ import annotations

from k3sagentd.core.k3s import Action, Datastore, Outcome
from k3sagentd.core.log import Abandon, Generation, Nominate, Value, init_of, is_abandoned
from k3sagentd.core.messages import Hello, Intent
from k3sagentd.core.state import Node
from k3sagentd.core.words import NodeId, NodePhase, Role, short

CLONED = (
    "another live machine has this node's identity ({address}); run k3sagentd reset on one of them"
)
AFTER_THE_SEAL = (NodePhase.JOINING, NodePhase.READY, NodePhase.FAILED)
GIVE_UP = "K3s's own k3s-uninstall.sh, which deletes it, then systemctl restart k3sagentd"


def existing_cluster(node: Node) -> str | None:
    """The cluster this machine's K3s data belongs to, unless we started it ourselves.

    Data that was there before the site stays such whatever an order of ours does with it (SQLite
    that is converted keeps its CA); so does what an earlier identity started, whose epochs are of
    another log. Data of an epoch that was abandoned is nobody's.
    """
    facts = node.facts
    if facts is None or facts.datastore in (Datastore.NONE, Datastore.AGENT):
        return None
    if facts.origin is not None:
        durable = node.durable
        started = (durable.started_generation, durable.started_epoch)
        made = (facts.origin_generation, facts.origin)
        ours = facts.origin_node == node.id and facts.origin_generation == node.generation.number
        if started == made and ours:
            return None
        if _abandoned(node, *made, facts.origin_node):
            return None
    return facts.ca_hash or f"unknown, on {short(node.id)}"


def claim(node: Node, hello: Hello) -> str | None:
    """The cluster that a peer has from before, unless we know that its epoch was abandoned.

    The peer may not know: it lost its state, or is behind.
    """
    if hello.generation != node.generation:
        return None  # of a cluster that the operator gave up, or is about to lead us to
    epoch = hello.existing_epoch
    generation, by = hello.existing_generation, hello.existing_by
    if epoch is not None and _abandoned(node, generation, epoch, by):
        return None
    return hello.existing


def _abandoned(node: Node, generation: int, epoch: int, by: NodeId | None) -> bool:
    """Whether our log says so of what ``by`` started: another log had an epoch of that number."""
    if generation != node.generation.number or by is None:
        return False
    return init_of(node.log, epoch) == by and is_abandoned(node.log, epoch)


def holds_data(node: Node) -> bool:
    """Whether this machine's K3s has, or may be about to have, data of the cluster that it knows.

    Such a node does not follow a forced start by itself: that would be a member of one cluster
    that starts in another.
    """
    order, outcome = node.drive.order, node.drive.outcome
    starting = order is not None and order.action in (Action.INIT, Action.JOIN)
    if starting and outcome in (Outcome.RUNNING, Outcome.DONE):
        return True
    if node.k3s.running or node.k3s.ready:
        return True  # its unit started it with the machine, after the disk was looked at
    if node.facts is None or node.facts.datastore is not Datastore.NONE:
        return True
    return node.durable.started_epoch is not None and not starting


def _has_data(node: Node) -> bool:
    """Whether K3s here has data of the cluster that it knows: by the disk, or, as that was looked
    at before K3s had begun, by what it was started to be."""
    order = node.drive.order
    started = order is not None and order.action in (Action.INIT, Action.JOIN)
    if (started and node.drive.outcome is Outcome.DONE) or node.k3s.running or node.k3s.ready:
        return True
    return node.facts is not None and node.facts.datastore is not Datastore.NONE


def superseded(node: Node) -> str | None:
    """The operator forced a new cluster, and this machine has data of the one before, or was told
    to start it and does not know what came of that."""
    order = node.drive.order
    starting = order is not None and order.action in (Action.INIT, Action.JOIN)
    was_told = node.durable.started_epoch is not None and not starting
    if not _has_data(node) and not (was_told and node.facts is not None):
        return None
    has = "has data of" if _has_data(node) else "was to start"
    for hello in node.up:
        if hello.generation <= node.generation:
            continue
        name = node.name_of(hello.generation.by)
        if _goes_on(node, hello.generation):
            return (
                f"{name} was forced to start a cluster with the CA of this machine's; if it is the "
                "same: k3sagentd reset here, one machine after the other, while the others are "
                "ready"
            )
        return (
            f"{name} was forced to start a new cluster, and this machine {has} the one before; "
            "k3sagentd reset here gives that up and joins the new one"
        )
    return None


def _goes_on(node: Node, generation: Generation) -> bool:
    """Whether who was forced had data with this machine's CA: perhaps it is the same cluster."""
    forced, facts = node.peers.get(generation.by), node.facts
    if forced is None or forced.hello.generation != generation or facts is None:
        return False
    return facts.ca_hash is not None and forced.hello.existing == facts.ca_hash


def why_not_force(node: Node) -> str | None:
    """Why the operator's word is not taken here; None where it is."""
    if node.facts is None:
        return "it waits for the facts about this machine's disk"
    if trouble := conflict(node):
        return trouble
    if is_forced_already(node):
        return None
    if node.phase is NodePhase.STANDING_DOWN:
        return "what an abandoned start left is being put aside here; try again when that is done"
    if node.site.role is Role.AGENT:
        return "role is agent here; allowed: server or auto"
    stores = (Datastore.ETCD, Datastore.SQLITE)
    holders = [hello for hello in node.up if hello.member or hello.datastore in stores]
    holders = [hello for hello in holders if not is_of_our_cluster(node, hello)]
    if holders:
        names = ", ".join(node.name_of(hello.node) for hello in holders)
        return f"{names} has a cluster's data; bring it up there, or k3sagentd reset it first"
    store = node.facts.datastore
    if is_cloned(node):
        return f"{muted(node)}; what is forced on one would be the other's start as well"
    if node.seal is not None and store is Datastore.ETCD:
        return "this machine has the data of the site's cluster, and must not found another"
    if store is Datastore.AGENT or (node.seal is not None and _has_data(node)):
        return "this machine's K3s has data of the old cluster; k3sagentd reset first"
    return None


def is_forced_already(node: Node) -> bool:
    """Whether the operator's word was taken here and stands: the cluster is started, or is here."""
    has_it = node.facts is not None and node.facts.datastore is Datastore.ETCD
    return node.is_forced and (node.seal is None or has_it)


def is_cloned(node: Node) -> bool:
    """Whether this identity is, or was, that of another live machine as well: what is decided for
    the one is not decided for the other."""
    muted = node.durable.muted
    return muted is not None and muted.startswith(CLONED.partition("{")[0])


def muted(node: Node) -> str | None:
    """Why this identity never votes again, and what a person can do; None where it may vote.

    Nobody is told to reset a machine that may have the only data of a cluster, nor one that voted
    while the others go on.
    """
    reason, facts = node.durable.muted, node.facts
    if reason is None or is_cloned(node) or facts is None or node.seal is not None:
        return reason
    if facts.datastore is Datastore.NONE:
        return (
            f"{reason}; where the site needs its vote, and none of its machines has a cluster: "
            "k3sagentd reset on all of them"
        )
    if facts.datastore is Datastore.AGENT:
        return f"{reason}; it waits for a server of its cluster"
    if facts.removed:
        return reason
    was_here_first = facts.told_name is None and facts.origin is None
    is_all = node.nodes == 1 and facts.origin_node == node.id
    if not (was_here_first or is_all):
        return f"{reason}; it waits for the other machines of its site"
    if any(is_of_our_cluster(node, h) and h.may_vote and h.role is not Role.AGENT for h in node.up):
        return reason  # that one starts the site
    return f"{reason}; k3sagentd cluster-init --force here starts the site with the cluster it has"


def is_of_our_cluster(node: Node, hello: Hello) -> bool:
    """Whether a peer has data of the same cluster as this machine."""
    facts = node.facts
    if facts is None or facts.ca_hash is None or facts.datastore is not Datastore.ETCD:
        return False
    return hello.existing == facts.ca_hash


def quorum_missing(node: Node) -> str | None:
    """Too few machines here to agree on anything."""
    if node.seen < node.quorum:
        return f"{node.seen} of {node.nodes} machines here, {node.quorum} must agree"
    unable = [node.name_of(node.id)] if node.durable.muted else []
    for hello in node.up:
        if hello.nodes != node.nodes:
            unable.append(f"{node.name_of(hello.node)} (nodes is {hello.nodes} there)")
        elif not hello.may_vote:
            unable.append(node.name_of(hello.node))
    able = node.seen - len(unable)
    if able >= node.quorum:
        return None
    return (
        f"{able} of {node.nodes} machines here may vote, {node.quorum} must agree; "
        f"not {', '.join(unable)}"
    )


def conflict(node: Node) -> str | None:
    """Two clusters under one token, or a log that contradicts ours: nobody installs anything."""
    if node.split:
        return node.split
    if trouble := superseded(node):
        return trouble
    if trouble := another_log(node):
        return trouble
    mine = existing_cluster(node)
    if node.seal is not None:
        if mine is None or mine == node.seal.ca_hash:
            return None
        two = f"{_cluster(mine)}, and the site's is another, {_cluster(node.seal.ca_hash)}"
        if node.facts is not None and node.facts.told_name is not None:
            return (
                f"K3s here, which was started for this site, has {two}: its CA was changed, or "
                "this is another cluster's disk"
            )
        return f"this machine's cluster has {two}; to give it up and join: {GIVE_UP} here"
    clusters = {there: hello.node for hello in node.up if (there := claim(node, hello))}
    if mine is not None:
        clusters[mine] = node.id
    if len(clusters) < 2:
        return None
    named = " and ".join(
        f"{_cluster(cluster)} on {node.name_of(holder)}" for cluster, holder in clusters.items()
    )
    return (
        f"two clusters under one token: {named}; on the machines of the one to give up: {GIVE_UP}"
    )


def another_log(node: Node) -> str | None:
    """A sealed site is here, and what was chosen among other machines before stands in its way.

    A seal ends the log: who has as many entries and none has entries of another log.
    """
    if node.seal is not None:
        return None
    for peer in node.peers.values():
        if not _is_sealed(node, peer.hello) or peer.hello.log_length > len(node.log):
            continue
        name = node.name_of(peer.hello.node)
        if (mine := existing_cluster(node)) is not None:
            return (
                f"{name} is of a site that is sealed, and this machine has a cluster of its own "
                f"({_cluster(mine)}); to give it up and join: {GIVE_UP} here"
            )
        return (
            f"{name} is of a site that is sealed, and this machine had begun another one; "
            "k3sagentd reset here, and it joins that site"
        )
    return None


def _is_sealed(node: Node, hello: Hello) -> bool:
    """Whether a peer, as we last heard, knew the seal of the log that this node follows."""
    return hello.generation == node.generation and hello.phase in AFTER_THE_SEAL


def _cluster(existing: str) -> str:
    return f"CA {existing[:12]}" if len(existing) == 64 else existing


def settled_s(node: Node) -> float:
    """From when on who is heard counts as all there are.

    ``nodes`` machines are complete (design, 4.3); but they may be late ones, that hear each other
    a moment before the cluster which is there.
    """
    site, new_s = node.site, max(node.attached_s, node.last_new_s)
    if node.nodes == 1:
        return new_s + max(site.settle_s, site.alone_s)
    return new_s + (min(site.settle_s, site.look_s) if node.seen == node.nodes else site.settle_s)


def disagreement(node: Node) -> str | None:
    """A peer is configured for another site size, so two quorums might not meet (design, 3)."""
    for hello in node.up:
        if hello.nodes > node.nodes:
            return _differs(node, "nodes", node.nodes, hello.nodes, hello)
        if not hello.has_voted:
            continue
        if hello.nodes != node.nodes:
            return _differs(node, "nodes", node.nodes, hello.nodes, hello)
        if hello.servers != node.site.servers:
            return _differs(node, "servers", node.site.servers, hello.servers, hello)
    return None


def misconfigured(node: Node) -> str | None:
    """Any peer with another idea of the site, whether or not it matters for our votes."""
    for hello in node.up:
        if hello.nodes != node.nodes:
            return _differs(node, "nodes", node.nodes, hello.nodes, hello)
        if hello.servers != node.site.servers:
            return _differs(node, "servers", node.site.servers, hello.servers, hello)
    return None


def counts_otherwise(node: Node, sender: NodeId, nodes: int) -> str | None:
    """Why this node's vote must not be counted: quorums of different ``nodes`` need not meet.

    The guard that needs no knowledge of the peer: its hello may be older than its ballot.
    """
    if nodes == node.nodes:
        return None
    return f"nodes is {node.nodes} here but {nodes} on {node.name_of(sender)}"


def behind(node: Node) -> str | None:
    """A peer has learned more: what is open here is decided there."""
    for hello in node.up:
        newer = hello.generation > node.generation
        if newer or (hello.log_length > len(node.log) and hello.nodes == node.nodes):
            return f"the newest entries of the bootstrap log from {node.name_of(hello.node)}"
    return None


def _differs(node: Node, key: str, mine: int, theirs: int, hello: Hello) -> str:
    where = f" ({hello.address})" if hello.address else ""
    return (
        f"{key} is {mine} here but {theirs} on {node.name_of(hello.node)}{where}; "
        "set the same number on both"
    )


def crowd(node: Node) -> str | None:
    """More machines than voters, before anything was decided."""
    if node.log or node.seen <= node.nodes:
        return None
    remedy = f"set nodes: {node.seen} on each, or take one away"
    if node.durable.nodes is not None:
        remedy = "take one away until the cluster is there (votes were cast, nodes is frozen)"
    return f"{node.seen} machines here but nodes is {node.nodes}; {remedy}"


def may_not_vote(node: Node) -> str | None:
    """Why this node answers no ballot, whoever asks."""
    if node.durable.muted:
        return muted(node)
    if node.storage_failure:
        return f"cannot write its state: {node.storage_failure}"
    if node.facts is None:
        return "the facts about this machine's disk (k3sagentd facts)"
    if node.generation.number:
        return "the init node that the operator forced: nobody votes beside it"
    if trouble := conflict(node):
        return trouble
    return disagreement(node) or behind(node) or crowd(node)


def may_not_propose(node: Node) -> str | None:
    """Why this node starts no ballot."""
    return quorum_missing(node) or may_not_vote(node)


def keeps_the_init_node(
    node: Node, sender: NodeId, what: Intent | Value, now_s: float
) -> str | None:
    """Why an acceptor refuses to abandon: it has heard the init node lately (design, 4.3).

    The init node itself may always abandon. Refusing is always safe in Paxos; this rule keeps
    one cut cable from costing a running server its epoch.
    """
    abandons = what is Intent.ABANDON or isinstance(what, Abandon)
    nomination = node.nomination
    if not abandons or nomination is None or sender == nomination.init:
        return None
    if node.hears(nomination.init, now_s, node.site.abandon_after_s):
        return f"hears the init node {node.name_of(nomination.init)}"
    return None


def foreign_nomination(node: Node, value: Value) -> str | None:
    """Why an acceptor refuses a nomination: its own disk says that there is a cluster already."""
    if not isinstance(value, Nominate):
        return None
    init = node.peers.get(value.init)
    theirs = claim(node, init.hello) if init is not None else None
    facts = node.facts
    if facts is not None and facts.datastore is Datastore.AGENT:
        if theirs is not None and facts.ca_hash in (None, theirs):
            return None
        return "is an agent of a cluster that the nominated node has not"
    mine = existing_cluster(node)
    if mine is None or value.init == node.id:
        return None
    if theirs == mine:
        return None
    return f"has K3s data of a cluster ({_cluster(mine)}) that the nominated node has not"


def nominates_out_of_sight(node: Node, what: Intent | Value) -> str | None:
    """Why an acceptor refuses to nominate: it heard of a cluster that the proposer may not know."""
    nominates = what is Intent.NOMINATE or isinstance(what, Nominate)
    unheard = cluster_out_of_sight(node) if nominates else None
    return f"waits for {unheard}" if unheard else None


def cluster_elsewhere(node: Node) -> str | None:
    """Why an init node gives its epoch up: another machine has a cluster, and it has none.

    Acceptors that see such a machine must not refuse for that: a value that some accepted may be
    chosen, and who has to propose it again would be refused for ever.
    """
    if existing_cluster(node) is not None or node.seal is not None:
        return None
    for hello in node.up:
        if claim(node, hello) is not None:
            return f"{node.name_of(hello.node)} has K3s data of a cluster already"
    return None


def is_installed_anew(node: Node, machine: NodeId) -> bool:
    """Whether the hardware of a node that is gone is here under another identity."""
    peer = node.peers.get(machine)
    mark = peer.hello.hardware if peer is not None else None
    here = (node.site.hardware, *(hello.hardware for hello in node.up))
    return mark is not None and mark in here


def cluster_out_of_sight(node: Node) -> str | None:
    """Why nobody is nominated: a cluster was heard of here, and its servers are not here.

    Who was off for a minute comes back with its cluster; founding another meanwhile is for good.
    A machine that has another identity now, as after ``k3sagentd reset``, is not missed.
    """
    here = {there for hello in node.up if (there := claim(node, hello))}
    here |= {existing_cluster(node) or ""}
    for peer in node.peers.values():
        lost, there = peer.hello.node, claim(node, peer.hello)
        if there is None and node.seal is None and _is_sealed(node, peer.hello):
            there = "sealed"
        if peer.up or there is None or there in here or is_installed_anew(node, lost):
            continue
        return (
            f"{node.name_of(lost)}, which has K3s data of a cluster, to be on again; if it "
            "is gone for good, systemctl restart k3sagentd on every machine"
        )
    agents = [hello.node for hello in node.up if hello.datastore is Datastore.AGENT]
    if node.facts is not None and node.facts.datastore is Datastore.AGENT:
        agents.append(node.id)
    if agents and not any(here):
        return (
            f"a server of the cluster that {node.name_of(agents[0])} is an agent of; if that is "
            "gone for good, k3sagentd reset there"
        )
    return None
