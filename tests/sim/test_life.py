# SPDX-License-Identifier: Apache-2.0
"""Life after the seal as the daemon tells it to the core: a probe finds K3s ready, and nobody has
looked at the disk again since K3s began. Each was a bug."""

from dataclasses import replace

import pytest

from k3sagentd.core import guards, status
from k3sagentd.core.cluster import KubeNode, Roster
from k3sagentd.core.events import AddressChanged, K3sProbed, MessageReceived
from k3sagentd.core.hello import server_url
from k3sagentd.core.k3s import Action, Datastore, Facts, K3sState, ServerOrAgent
from k3sagentd.core.log import Nominate
from k3sagentd.core.messages import Learned
from k3sagentd.core.state import PEERS_LIMIT, Durable, Node, Peer
from k3sagentd.core.words import NodeId, NodePhase
from tests.sim.scenario import Machine, Wire

CA = "a0" * 32
THREE_SERVERS = """\
site a b c d e nodes=4
on a b c d
meet a b c d
deliver
apply a done
probed a
deliver
apply b done
apply c done
deliver
go 4s
apply b done
probed b
deliver
go 4s
apply c done
probed c
apply d done
probed d
deliver
go 60s"""


def play(commands: str, wire: Wire | None = None) -> Wire:
    """Obey ``commands``; ``probed`` is what a probe alone says of a K3s that is ready."""
    wire = wire or Wire()
    for command in commands.splitlines():
        if command.startswith("probed "):
            probed(wire, command.split()[1])
        else:
            wire.obey(command)
    return wire


def probed(wire: Wire, name: str) -> None:
    m = wire.machines[name]
    assert m.node is not None
    m.ready = True
    order = m.node.drive.order
    assert order is not None
    server = order.role is ServerOrAgent.SERVER
    wire._kube.register(m.id, m.site.hardware, server=server)
    ca_hash = (m.node.seal.ca_hash if m.node.seal else CA) if server else None
    feed(wire, name, K3sState(running=True, ready=True, ca_hash=ca_hash, detail="ready"))


def feed(wire: Wire, name: str, state: K3sState) -> None:
    m = wire.machines[name]
    m.ready = state.ready
    wire._feed(m, K3sProbed(now_s=wire.now_s, state=state))


def node_of(wire: Wire, name: str) -> Node:
    node = wire.machines[name].node
    assert node is not None
    return node


def said(wire: Wire, name: str) -> str:
    return str(status.waiting_for(node_of(wire, name), wire.now_s))


def test_a_server_whose_k3s_is_stopped_for_a_while_stays_a_member() -> None:
    wire = play(THREE_SERVERS)
    assert node_of(wire, "b").phase is NodePhase.READY
    feed(wire, "b", K3sState(detail="its server does not answer"))
    play("go 280s", wire)
    assert "b" in wire._kube.nodes
    order = wire.machines["b"].order
    assert order is not None
    assert (order.action, order.attempt) == (Action.JOIN, 0)
    # Root looks again: perhaps it was removed from etcd, and waits for its data to go aside.
    play("go 40s", wire)
    order = wire.machines["b"].order
    assert order is not None
    assert (order.action, order.attempt) == (Action.JOIN, 1)
    play("apply b done\nprobed b\ndeliver", wire)
    assert node_of(wire, "b").phase is NodePhase.READY


def test_no_force_beside_a_server_that_only_waits_for_its_quorum() -> None:
    wire = play(THREE_SERVERS + "\noff a\noff c")
    feed(wire, "b", K3sState(running=True, detail="etcd has no quorum"))
    play("on e\nmeet b d e\ngo 20s", wire)
    refused = guards.why_not_force(node_of(wire, "e"))
    assert refused == "b has a cluster's data; bring it up there, or k3sagentd reset it first"


def test_one_probe_that_fails_orders_nothing() -> None:
    wire = play(
        "site a b nodes=2 servers=1\non a b\nmeet a b\ndeliver\napply a done\nprobed a\ndeliver"
    )
    assert node_of(wire, "a").phase is NodePhase.READY
    before = wire.machines["a"].order
    feed(wire, "a", K3sState(detail="its server does not answer (no answer in time)"))
    play("go 60s", wire)
    assert wire.machines["a"].order == before


def test_of_two_servers_that_leave_at_once_one_is_refused() -> None:
    wire = play(THREE_SERVERS)

    def drained(name: str) -> None:
        kube = wire._kube.nodes[name]
        wire._kube.nodes[name] = replace(kube, cordoned=True)

    play("leave b drain\ngo 1s", wire)
    drained("b")
    play("go 3s\nleave c drain\ngo 20s", wire)
    b, c = node_of(wire, "b").leaving, node_of(wire, "c").leaving
    assert b is not None
    assert b.done
    assert c is not None
    assert not c.done
    assert "1 of the 2 servers that stay are ready (not counting b: cordoned)" in str(
        c.refused or c.told
    )


def test_a_roster_of_an_earlier_life_of_the_site_is_nobodys() -> None:
    wire = play(f"site a b c nodes=3\ndisk a etcd {CA}\ndisk b etcd {CA}\ndisk c etcd {CA}")
    old = NodeId("old")
    wire._kube.version = 7
    wire._kube.roster = Roster(revision=3, servers=(old, NodeId("olda")), init=old)
    play("on a b c\nmeet a b c\ndeliver\ngo 10s", wire)
    first = next(name for name, m in wire.machines.items() if m.order is not None)
    play(f"apply {first} done\nready {first}\ndeliver\ngo 5s", wire)
    for name in "abc":
        if name != first:
            play(f"apply {name} done\nready {name}", wire)
    play("go 400s", wire)
    assert [node_of(wire, name).phase for name in "abc"] == [NodePhase.READY] * 3
    assert [node_of(wire, name).roster.servers for name in "abc"] != [old]


def test_a_daemon_that_is_silent_does_not_hold_up_the_place_of_a_dead_server() -> None:
    wire = play(THREE_SERVERS + "\noff c")
    heard = wire._kube.is_ready

    def is_ready(kube: KubeNode) -> bool:
        return kube.name == "c" or heard(kube)

    wire._kube.is_ready = is_ready
    play("go 700s\noff b\ngo 300s", wire)
    assert "power on" not in str(status.notes(node_of(wire, "a"), wire.now_s))
    play("go 900s", wire)
    assert wire._kube.roster is not None
    assert set(wire._kube.roster.servers) == {"a", "c", "d"}


def test_a_machine_that_goes_off_each_time_k3s_starts_is_not_the_init_node_for_ever() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\ngo 10s")
    for _ in range(7):
        play("off a\ngo 5s\non a\nmeet a b c\ngo 20s", wire)
    (_, abandoned, *_) = node_of(wire, "b").log
    assert "K3s was started here 5 times" in abandoned.describe()


def test_who_hears_its_namesake_late_takes_another_name() -> None:
    wire = play(
        "site a b nodes=2 servers=1\non a b\nmeet a b\ndeliver\napply a done\nprobed a\ndeliver\n"
        "apply b done\nprobed b\ndeliver\ngo 60s\nsite z nodes=2 servers=1"
    )
    late = wire.machines["z"]
    late.site = replace(late.site, hostname="b")
    play("on z\nmeet a z\ndeliver", wire)
    assert node_of(wire, "z").durable.node_name == "b"
    play("meet b z\ngo 60s", wire)
    assert node_of(wire, "z").durable.node_name == "b-z"
    order = late.order
    assert order is not None
    assert (order.action, order.node_name) == (Action.JOIN, "b-z")


def test_an_adopted_server_that_the_roster_does_not_know_is_one() -> None:
    wire = play("site a b c m n nodes=3 servers=3")
    for name in "abc":
        wire.machines[name].facts = Facts(
            fsync_ms=1.0, datastore=Datastore.ETCD, ca_hash=CA, node_name=name
        )
    play(
        "on a b m\nmeet a b m\ndeliver\ngo 10s\napply a done\nready a\ndeliver\napply b done\n"
        "ready b\napply m done\ngo 4s\napply m done\nready m\ndeliver\ngo 10s\noff m\non n\n"
        "meet a b n\ngo 700s\napply n done\ngo 4s\napply n done\nready n\ngo 30s",
        wire,
    )
    assert wire._kube.roster is not None
    play("on c\nmeet a b n c\ngo 20s", wire)
    order = wire.machines["c"].order
    assert order is not None
    assert (order.action, order.role) == (Action.JOIN, ServerOrAgent.SERVER)
    play("apply c done\nready c\ngo 400s", wire)
    assert node_of(wire, "c").phase is NodePhase.READY


def test_a_ballot_that_cannot_have_a_value_is_not_written_twice_a_minute() -> None:
    wire = play(
        f"site a b c d e nodes=5 servers=3\nrole e agent\ndisk e etcd {CA}\non a b c d e\n"
        "meet a b c d e\ngo 1200s"
    )
    lines = wire.shown()
    assert "e, which has K3s data of a cluster, to be able to lead" in said(wire, "a")
    play("go 3600s", wire)
    written = sum("persist " in line for line in wire.shown())
    assert lines
    assert written / 5 < 60


def test_a_forced_start_that_fails_waits_for_no_votes() -> None:
    wire = play("site a b c nodes=3\non a\nforce a\napply a hopeless")
    assert said(wire, "a").startswith("init failed at ")


ENTERING = f"""\
{THREE_SERVERS}
role d server
off d
on d
meet a b c d
ready d
deliver
go 4s"""
"""d was asked to be a server; root has not prepared it yet."""


def test_a_server_that_dies_while_it_takes_over_is_struck_out() -> None:
    """Else etcd has four members for good, of which one is dead."""
    wire = play(f"{ENTERING}\napply d done\ndeliver\ngo 4s\napply d done\ngo 4s")
    assert node_of(wire, "a").roster.servers == ("a", "b", "c", "d")
    order = wire.machines["d"].order
    assert order is not None
    assert (order.action, order.role) == (Action.JOIN, ServerOrAgent.SERVER)
    play("off d\ngo 290s", wire)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c", "d")
    play("go 400s", wire)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c")


def test_who_is_not_to_take_over_any_more_is_struck_out() -> None:
    wire = play(ENTERING)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c", "d")
    play("role d agent\noff d\non d\nmeet a b c d\ndeliver\ngo 2100s", wire)
    assert node_of(wire, "a").roster.servers == ("a", "b", "c")


def test_a_clone_starts_nothing_though_its_twin_was_nominated() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\nclone a")
    nominated = Nominate(init=NodeId("a"), servers=(NodeId("a"),))
    learned = Learned(first=0, entries=(nominated,), nodes=3)
    a = wire.machines["a"]
    wire._feed(a, MessageReceived(now_s=wire.now_s, sender=NodeId("b"), message=learned))
    assert node_of(wire, "a").phase is NodePhase.INITIALISING
    assert a.order is None
    assert said(wire, "a").startswith("a person: another live machine has this node's identity")


def test_no_start_is_forced_on_a_clone() -> None:
    """Its twin would take that start for its own, and lead as well."""
    wire = play("site a b c nodes=3\non a\nclone a")
    refused = str(guards.why_not_force(node_of(wire, "a")))
    assert refused.endswith(
        "k3sagentd reset on one of them; on this one before its start is forced"
    )
    wire = play(f"site a b c nodes=3\ndisk a sqlite {CA}\non a\nclone a")
    assert guards.why_not_force(node_of(wire, "a")) is None, "a reset would cost its data"


def test_who_was_not_heard_for_longest_makes_room() -> None:
    wire = play(THREE_SERVERS)
    a = wire.machines["a"]
    node = node_of(wire, "a")
    (hello, *_) = (peer.hello for peer in node.peers.values())
    crowd = {
        NodeId(f"x{n}"): Peer(
            hello=replace(hello, node=NodeId(f"x{n}")), up=False, heard_s=0.0, lost_s=float(n)
        )
        for n in range(PEERS_LIMIT - len(node.peers))
    }
    a.node = node.but(peers={**node.peers, **crowd})
    play("on e\nmeet a e\ngo 1s", wire)
    peers = node_of(wire, "a").peers
    assert len(peers) == PEERS_LIMIT
    assert NodeId("e") in peers
    assert NodeId("x0") not in peers


def test_a_joiner_whose_order_failed_after_k3s_was_started_is_not_removed() -> None:
    """It asks anew where to join, and its Node is there already: a member which starts."""
    wire = play(THREE_SERVERS.partition("apply c done\nprobed c")[0])
    c = wire.machines["c"]
    heard = wire._kube.is_ready
    wire._kube.is_ready = lambda kube: kube.name != "c" and heard(kube)
    wire._kube.register(c.id, c.site.hardware, server=True)
    play("go 40s\napply c late\ngo 120s", wire)
    assert node_of(wire, "c").announced.member
    assert "c" in wire._kube.nodes
    assert node_of(wire, "c").drive.told == "a: K3s on c to be ready: it is a member of etcd"
    wire._kube.is_ready = heard
    play("probed c\ngo 10s", wire)
    assert node_of(wire, "c").phase is NodePhase.READY
    assert c.order is not None
    assert (c.order.action, c.order.attempt) == (Action.JOIN, 1), "what failed is done again"


def test_a_joiner_that_cannot_start_k3s_is_no_member() -> None:
    """Else nobody would take the place of a machine that never gets so far."""
    wire = play(THREE_SERVERS.partition("apply c done\nprobed c")[0] + "apply c failed")
    assert not node_of(wire, "c").announced.member


def test_a_server_that_never_gets_ready_does_not_keep_the_others_few() -> None:
    until_b = THREE_SERVERS.partition("probed b")[0]
    wire = play(until_b + "go 290s")
    c = wire.machines["c"]
    assert said(wire, "c") == "server b to be ready first"
    play("go 30s", wire)
    assert c.order is not None
    assert c.order.action is Action.JOIN


@pytest.mark.parametrize("name", ["b", "c"])
def test_probes_count_for_what_is_on_the_disk(name: str) -> None:
    wire = play(THREE_SERVERS)
    facts = node_of(wire, name).facts
    assert facts is not None
    assert facts.datastore is Datastore.ETCD


def test_no_force_while_an_abandoned_start_is_put_aside() -> None:
    wire = play("site a b c nodes=3\non a b c\nmeet a b c\ngo 10s\napply a hopeless\ngo 30s")
    assert node_of(wire, "a").phase is NodePhase.STANDING_DOWN
    assert "put aside" in str(guards.why_not_force(node_of(wire, "a")))


def test_who_left_is_not_asked_for_when_etcd_has_no_quorum() -> None:
    wire = play(THREE_SERVERS + "\noff b\ngo 5s")
    del wire._kube.nodes["b"]
    node = node_of(wire, "a")
    look = replace(node.steward, view=wire._kube.view(), viewed_s=wire.now_s)
    wire.machines["a"].node = node.but(steward=look)
    play("go 5s\noff c\ngo 1s", wire)
    feed(wire, "a", K3sState(detail="its server does not answer"))
    lost = status.quorum_lost(node_of(wire, "a"))
    assert lost is not None
    assert lost.startswith("1 of etcd's 2 servers here, 2 must be")
    assert lost.endswith("power on c")


def test_a_server_of_another_cluster_is_none_of_the_sites() -> None:
    wire = play(THREE_SERVERS)
    assert guards.conflict(node_of(wire, "b")) is None
    assert server_url(node_of(wire, "b")) is not None
    feed(wire, "b", K3sState(running=True, ready=True, ca_hash="b0" * 32, detail="ready"))
    assert server_url(node_of(wire, "b")) is None


def test_an_agent_whose_name_was_taken_meanwhile_says_by_whom() -> None:
    """It was off for longer than replace-after, and a new machine has its hostname."""
    wire = play(THREE_SERVERS)
    play("ready d\ngo 10s\noff d\ngo 20s", wire)
    d, other = wire.machines["d"], NodeId("d-z")
    blank = Facts(fsync_ms=1.0)
    site = replace(d.site, hardware="of d-z")
    wire.machines[other] = Machine(other, site, Durable(node=other), blank)
    play("on d-z\nmeet a b c d-z\ngo 400s\napply d-z done\nready d-z\ngo 10s", wire)
    assert wire._kube.nodes["d"].node == other
    d.facts = replace(blank, datastore=Datastore.AGENT, ca_hash=CA)
    play("on d\nmeet a b c d d-z\ndeliver\ngo 5s\napply d done\ngo 200s", wire)
    taken = "another name: d is the machine at "
    assert taken in said(wire, "d")
    assert "k3sagentd reset there" in said(wire, "d")


def test_an_agent_follows_its_own_new_address_while_it_is_ready() -> None:
    wire = play(THREE_SERVERS)
    d = wire.machines["d"]
    play("ready d\ngo 10s", wire)
    before = d.order
    wire._feed(d, AddressChanged(now_s=wire.now_s, address="10.0.9.99", also=("10.0.0.4",)))
    assert d.order == before, "it has the old one as well"
    wire._feed(d, AddressChanged(now_s=wire.now_s, address="10.0.9.99"))
    assert d.order is not None
    assert before is not None
    assert (d.order.action, d.order.attempt) == (Action.JOIN, before.attempt + 1)
    play("apply d done\ngo 600s", wire)
    assert d.order.attempt == before.attempt + 1


def test_k3s_that_its_unit_started_holds_data() -> None:
    """After a power cut just after ``apply``: the disk was looked at before K3s had begun."""
    wire = play(THREE_SERVERS)
    play("off d\non d\nmeet a b c d", wire)
    d = wire.machines["d"]
    assert node_of(wire, "d").facts == Facts(fsync_ms=1.0)
    assert d.order is None
    assert not guards.holds_data(node_of(wire, "d"))
    feed(wire, "d", K3sState(running=True, ready=True, detail="ready"))
    assert guards.holds_data(node_of(wire, "d"))


def test_who_has_data_does_not_leave_unasked_because_its_log_is_lost() -> None:
    wire = play("site a b c nodes=3\ndisk a etcd " + CA + "\non a\nleave a stop\ngo 60s")
    leaving = node_of(wire, "a").leaving
    assert leaving is not None
    assert not leaving.done
    assert str(leaving.told).startswith("a peer that knows the site's cluster")
    wire = play("site a b c nodes=3\non a\nleave a stop\ngo 5s")
    leaving = node_of(wire, "a").leaving
    assert leaving is not None
    assert leaving.done, "it has nothing to leave"
