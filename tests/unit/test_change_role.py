# SPDX-License-Identifier: Apache-2.0
"""Members of ours: promoted, demoted, at a new address, labelled, marked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Datastore, Order, Outcome
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError, MachineError
from k3sagentd.k3s import credentials, dropin, facts, keepalived
from k3sagentd.k3s.credentials import Credentials
from k3sagentd.k3s.data import MARKER
from tests.unit.rooted import (
    AGENT,
    AS_AGENT,
    AS_SERVER,
    HASH,
    INIT,
    JOIN,
    JOIN_AGENT,
    NODE,
    ONE,
    SERVER,
    TOKEN,
    TWO,
    WAL,
    Machine,
)


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# --- promotion and demotion -----------------------------------------------------------------


def test_an_agent_becomes_a_server_and_keeps_images_and_password(m: Machine) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT, **{"node-ip": "10.0.0.6"})
    password = m.paths.root / "etc/rancher/node/password"
    password.parent.mkdir(parents=True)
    password.write_text("secret")
    m.does(replace(JOIN, action=Action.PREPARE), "install server")
    assert m.k3s.role is AGENT, "preparing disturbed it"
    m.does(JOIN, "install server", "stop", "start server")
    data = m.paths.k3s_data
    assert (data / "agent.before-server/client-kubelet.crt").exists()
    assert (data / "agent/images/all.tar").exists()
    assert not (data / "agent/client-kubelet.crt").exists()
    assert password.read_text() == "secret"
    assert m.said()["node-ip"] == "10.0.0.7"
    assert "tls-san" in m.said()
    assert m.paths.k3s_token.read_text() == f"K10{HASH}::server:{TOKEN}\n"


def test_a_server_that_has_not_joined_yet_is_stopped_as_well(m: Machine) -> None:
    """Its member was removed while it was off; it joined anew when it heard of the new roster."""
    m.ours(SERVER, **{"node-ip": "10.0.0.6"})
    step_down = replace(JOIN_AGENT, action=Action.STEP_DOWN)
    m.does(step_down, "halt", "stop")
    m.does(step_down)


def test_a_server_that_has_not_joined_yet_is_stopped_before_it_is_an_agent(m: Machine) -> None:
    """K3s as a server would read what is for the agent, and join as one by it."""
    m.ours(SERVER, **{"node-ip": "10.0.0.6"})
    m.does(JOIN_AGENT, "install agent", "halt", "stop", "start agent")
    # An agent that has not joined yet goes on with it.
    m.does(JOIN_AGENT, "install agent", "enable agent")


def test_a_demoted_init_node_is_an_agent_like_any_other(m: Machine) -> None:
    m.put(*AS_SERVER, WAL)
    (m.paths.k3s_data / MARKER).write_text(json.dumps({"epoch": 0}))
    m.ours(SERVER, **{"node-ip": "10.0.0.6", "tls-san": ["x"]})
    m.does(JOIN_AGENT, "install agent", "stop", "start agent")
    aside = m.paths.k3s_data / "server.before-agent"
    assert (aside / "db/etcd/member/wal").is_dir()
    assert (aside / MARKER).exists()
    assert "tls-san" not in m.said()
    # Until K3s has joined it is nobody's member: it asks where to join, and whether it may.
    found = facts.collect(m.paths, load_config(m.paths))
    assert (found.datastore, found.ca_hash, found.origin) == (Datastore.NONE, HASH, None)
    m.put(*AS_AGENT)
    found = facts.collect(m.paths, load_config(m.paths))
    assert (found.datastore, found.ca_hash, found.origin) == (Datastore.AGENT, HASH, None)
    # And back: what was aside stays, and a second time has a name of its own.
    m.does(JOIN, "install server", "stop", "start server")
    m.put(*AS_SERVER, WAL)
    m.does(JOIN_AGENT, "install agent", "stop", "start agent")
    assert aside.with_name("server.before-agent-2").is_dir()


@pytest.mark.parametrize("order", [JOIN, JOIN_AGENT])
def test_data_of_another_cluster_is_not_touched(m: Machine, order: Order) -> None:
    m.put(*AS_AGENT, ca=b"another")
    m.ours(AGENT)
    m.refuses(order, "the data of an agent of another cluster (CA ")
    m.put(*AS_SERVER[:1], WAL, ca=b"another")
    m.refuses(order, "the data of a server of another cluster (CA ")


def test_a_role_is_not_changed_while_no_other_server_answers(m: Machine) -> None:
    m.put(*AS_SERVER, WAL)
    m.ours(SERVER)
    m.there = {ONE: "f" * 64}
    before = m.files()
    result = m.apply(JOIN_AGENT)
    assert result.outcome is Outcome.FAILED
    assert f"{ONE} has CA ffff" in str(result.reason)
    m.there, m.at = {ONE: HASH}, Attachment("eth0", 2, "10.0.0.1")
    assert f"{ONE} is this machine itself" in str(m.apply(JOIN_AGENT).reason)
    assert (m.files(), m.k3s.did) == (before, [])


# --- orders that fail -----------------------------------------------------------------------


def test_an_order_that_fails_says_whether_k3s_runs_and_what_is_there(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the steps after its start on, the machine may be a member of etcd at any moment."""
    m.there = {}
    result = m.apply(JOIN)
    assert (result.outcome, result.started) == (Outcome.FAILED, False)
    m.there = {ONE: HASH}

    def withdraw(*_: object) -> None:
        m.put(*AS_SERVER, WAL)
        raise MachineError("keepalived.service is masked")

    with monkeypatch.context() as patch:
        patch.setattr(keepalived, "withdraw", withdraw)
        result = m.apply(JOIN)
    assert "start server" in m.k3s.did
    assert (result.outcome, result.started) == (Outcome.FAILED, True)
    found = facts.read_facts(m.paths)
    assert found is not None
    assert found.facts.datastore is Datastore.ETCD
    # As a server it runs still, but this order would have had an agent.
    m.there = {}
    result = m.apply(JOIN_AGENT)
    assert (result.outcome, result.started) == (Outcome.FAILED, False)


def test_what_is_there_cannot_be_seen_and_the_failure_is_reported_all_the_same(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_facts(*_: object) -> None:
        raise ValueError("nobody foresaw this")

    monkeypatch.setattr(facts, "write_facts", write_facts)
    result = m.apply(JOIN)
    assert (result.outcome, result.started) == (Outcome.FAILED, True)
    assert "a fault of k3sagentd's own: ValueError" in str(result.reason)


# --- addresses ------------------------------------------------------------------------------


def test_an_agent_keeps_its_server_while_that_answers(m: Machine) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT)
    order = replace(JOIN_AGENT, servers=(TWO, ONE))
    m.does(order, "restart agent")  # the rest of the drop-in was not there yet
    m.does(order)
    assert m.said()["server"] == ONE
    del m.there[ONE]
    m.does(order, "restart agent")
    assert m.said()["server"] == TWO
    m.there = {ONE: "f" * 64}
    m.does(order)
    assert m.said()["server"] == TWO, "nobody better answers"
    m.at = replace(m.at, address="10.0.0.8")
    m.does(order, "restart agent")
    assert m.said()["node-ip"] == "10.0.0.8"
    m.at = None  # a cable that was pulled is no new address
    m.does(order)
    assert m.said()["node-ip"] == "10.0.0.8"


def test_a_server_keeps_the_address_that_etcd_knows_and_is_not_restarted(m: Machine) -> None:
    m.put(*AS_SERVER, WAL)
    m.ours(SERVER, **{"node-ip": "10.0.0.6", "flannel-iface": "eth1"})
    del m.there[ONE]
    m.does(JOIN)
    said = m.said()
    assert (said["node-ip"], said["flannel-iface"]) == ("10.0.0.6", "eth1")
    assert said["server"] == TWO
    assert "10.0.0.7" in said["tls-san"]
    assert facts.collect(m.paths, load_config(m.paths)).node_ip == "10.0.0.6"


# --- labels, marker -------------------------------------------------------------------------


@pytest.mark.parametrize("order", [INIT, JOIN_AGENT])
def test_nodes_say_which_machine_they_are(m: Machine, order: Order) -> None:
    m.configure("k3s: {node-label+: [rack=3]}\n")
    m.paths.k3s_config.write_text("node-label: [shop=7]\n")
    (m.paths.dropin.parent / "99.yaml").write_text("node-label+: late=1\n")
    m.does(replace(order, node="ab12", hardware="0" * 16), f"install {order.role}",
           f"start {order.role}")  # fmt: skip
    labels = [
        "shop=7",
        "late=1",
        "rack=3",
        "k3sagentd/node-id=ab12",
        f"k3sagentd/hardware={'0' * 16}",
    ]
    assert m.said()["node-label"] == labels
    m.does(replace(order, node="ab12", hardware="0" * 16), f"install {order.role}",
           f"enable {order.role}")  # fmt: skip


@pytest.mark.parametrize("made", [{"epoch": 1}, {"epoch": 0, "generation": 1}])
def test_data_of_another_epoch_or_generation_is_not_begun_again(m: Machine, made: dict) -> None:
    m.put(*AS_SERVER, WAL)
    (m.paths.k3s_data / MARKER).write_text(json.dumps({**made, "node": NODE}))
    m.ours(SERVER)
    m.refuses(INIT, "this is epoch 0; move it aside")
    found = facts.collect(m.paths, load_config(m.paths))
    assert (found.origin, found.origin_generation) == (made["epoch"], made.get("generation", 0))
    assert found.origin_node == NODE


def test_a_new_cluster_is_marked_with_its_generation_and_its_node(m: Machine) -> None:
    m.does(replace(INIT, generation=2), "install server", "start server")
    marked = json.loads((m.paths.k3s_data / MARKER).read_text())
    assert marked == {"epoch": 0, "generation": 2, "node": NODE}


def test_a_wrong_configuration_of_k3s_does_not_stop_the_facts(m: Machine) -> None:
    m.paths.k3s_config.write_text("[]\n")
    assert facts.collect(m.paths, load_config(m.paths)).shared_flags == {}
    with pytest.raises(ConfigError):
        dropin.contents(INIT, None, load_config(m.paths), m.paths, m.at)


# --- removed from etcd ----------------------------------------------------------------------


def test_a_removed_member_joins_anew_and_never_founds(m: Machine) -> None:
    m.put(*AS_SERVER, WAL, "server/db/etcd/tombstone")
    m.ours(SERVER)
    refused = m.apply(INIT)
    assert refused.outcome is Outcome.FAILED
    assert "was removed from its cluster" in str(refused.reason)
    assert m.k3s.did == []
    m.there = {}
    assert m.apply(JOIN).outcome is Outcome.FAILED, "nobody is there to join"
    assert (m.paths.k3s_data / "server/db/etcd/tombstone").exists()
    m.there = {ONE: HASH}
    assert m.apply(JOIN).outcome is Outcome.DONE
    assert (m.paths.k3s_data / "server/db/etcd.removed/member/wal").exists()
    assert "cluster-init" not in m.said()
    assert "stop" in m.k3s.did


def test_a_member_that_learns_of_its_removal_meanwhile_is_not_started(
    m: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K3s, which its unit had started at boot, hears from its peers what it is no more."""
    m.put(*AS_SERVER, WAL)
    m.ours(SERVER)

    def choose(*_: object) -> Credentials:
        m.put("server/db/etcd/tombstone")
        return Credentials(token=TOKEN)

    monkeypatch.setattr(credentials, "choose", choose)
    result = m.apply(INIT)
    assert result.outcome is Outcome.FAILED
    assert "was removed from its cluster" in str(result.reason)
    assert (m.paths.k3s_data / WAL).exists()
    assert "cluster-init" not in m.said()
    assert m.k3s.did == []


def test_a_cluster_whose_data_is_gone_is_not_founded_again(m: Machine) -> None:
    """Its owner moved it, or its disk is not mounted: whoever is in it would have a second one."""
    assert m.apply(INIT).outcome is Outcome.DONE
    m.put(*AS_SERVER, WAL)
    sealed = replace(INIT, ca_hash=HASH)
    assert m.apply(sealed).outcome is Outcome.DONE
    m.k3s.stop()
    m.k3s.did.clear()
    m.paths.k3s_data.rename(m.paths.k3s_data.with_name("backup"))
    refused = m.apply(replace(sealed, attempt=1))
    assert refused.outcome is Outcome.FAILED
    assert "bring it back" in str(refused.reason)
    assert m.k3s.did == []
    assert not m.paths.k3s_data.exists()
