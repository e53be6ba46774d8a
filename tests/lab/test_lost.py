# SPDX-License-Identifier: Apache-2.0
"""Servers that are gone for good before the cluster was whole: one of the founding servers, which
another machine replaces; and the only one, with which the cluster is lost."""

from k3sagentd.core.words import short
from k3sagentd.lab import site
from tests.lab.cluster import (
    DAEMON,
    YES,
    agents,
    cluster_id,
    end,
    events,
    files,
    init_machine,
    k3sagentd,
    nodes,
    refused,
    said,
    servers,
    voters,
    wipe,
)
from tests.lab.conftest import Bench, agreed

LIFE = ("--stand-in", "promote_s=2", "--stand-in", "node_grace_s=4", "--set", "replace-after=10s")


def test_a_founding_server_that_dies_does_not_hold_up_the_others(lab: Bench) -> None:
    lab.run("up", "--nodes", "4", "--wait", "sealed", "--set", "settle=30s", *LIFE)
    views = lab.views()
    roster = next(iter(views.values()))["site"]["roster"]
    dead = next(name for name, view in views.items() if view["node"]["id"] == roster[-1])
    assert dead != init_machine(views)
    lab.run("kill", dead)
    assert not (files(dead) / "var/lib/rancher/k3s/server/db/etcd").exists(), "it was too late"
    others = [name for name in views if name != dead]
    views = lab.until(lambda v: sorted(servers(v)) == others)
    assert len(voters(others[0])) == 3
    # Whose place it was is an agent now.
    lab.run("start", dead)
    views = lab.until(lambda v: agents(v) == [dead])
    agreed(views)
    lab.until(lambda _: set(nodes(others[0])) == set(views))


def test_the_only_server_is_gone_for_good(lab: Bench) -> None:
    lab.run("up", "--nodes", "3", "--servers", "1", "--wait", "complete", *LIFE)
    views = lab.views()
    before, lost = agreed(views), init_machine(views)
    holder, other = agents(views)
    lab.run("kill", lost)
    wipe(lost)
    forced, empty = (lab.run("add").split()[0] for _ in range(2))
    # Status says who it is, and both ways out.
    gone = f"waits for {lost}, the cluster's only server, not heard for"
    stranger = f"{short(views[lost]['node']['id'])}, the cluster's only server, not heard for"
    lab.until(lambda v: all(gone in said(v, each) for each in (holder, other)))
    views = lab.until(lambda v: all(stranger in said(v, each) for each in (forced, empty)))
    for name in (holder, other, forced, empty):
        assert "power it on; or, if its disk is lost for good" in said(views, name)
        assert "k3sagentd cluster-init --force on another machine" in said(views, name)

    assert "k3sagentd reset first" in refused(lab, holder, "cluster-init", "--force", YES)
    k3sagentd(lab, forced, "cluster-init", "--force", YES)
    # Who holds nothing follows by itself; who does, and could not be helped otherwise, is asked.
    lost_data = "has data of the one before; k3sagentd reset here gives that up"
    views = lab.until(
        lambda v: (
            servers(v) == [forced]
            and agents(v) == [empty]
            and all(lost_data in said(v, each) for each in (holder, other))
        )
    )
    assert views[holder]["node"]["phase"] == "conflict"
    assert views[forced]["site"]["ca_hash"] != before["ca_hash"]
    assert "follows the start that" in events(views, empty)
    held = {path.stat().st_ino for path in (files(holder) / "var/lib/rancher").rglob("*.crt")}
    assert held
    assert "the only server" in refused(lab, forced, "leave", YES)
    k3sagentd(lab, forced, "cluster-init", "--force", YES)  # again: it is done already
    assert lab.views()[forced]["site"]["ca_hash"] == views[forced]["site"]["ca_hash"]

    end(holder, *DAEMON)
    k3sagentd(lab, holder, "reset", YES)
    lab.run("kill", holder)
    for name in (holder, lost):
        lab.run("start", name)
    views = lab.until(lambda v: sorted(agents(v)) == sorted([empty, holder, lost]))
    agreed({name: view for name, view in views.items() if name != other})
    assert views[other]["node"]["phase"] == "conflict"
    assert cluster_id(forced)
    lab.until(lambda _: set(nodes(forced)) == set(site.load().machines) - {other})
    kept = {path.stat().st_ino for path in (files(holder) / "var/lib/rancher").rglob("*.crt")}
    assert held <= kept, "what K3s wrote is moved aside"
