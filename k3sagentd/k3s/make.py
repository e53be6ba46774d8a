# SPDX-License-Identifier: Apache-2.0
"""Root's orders INIT and JOIN where K3s is ours: install, configure, check, start.

Everything that K3s must know is on the disk before it first starts, and is read back as K3s will
read it. A server that runs is never restarted for a changed ``server:``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from k3sagentd import keys
from k3sagentd.core.k3s import Action, Datastore, ServerOrAgent
from k3sagentd.discovery.addresses import attachment
from k3sagentd.errors import MachineError
from k3sagentd.k3s import credentials, dropin, keepalived
from k3sagentd.k3s.change_role import change, is_change
from k3sagentd.k3s.convert import begin as begin_conversion
from k3sagentd.k3s.convert import check as check_conversion
from k3sagentd.k3s.convert import convert
from k3sagentd.k3s.credentials import Credentials
from k3sagentd.k3s.data import (
    ETCD,
    datastore,
    is_removed,
    put_aside,
    write,
    write_marker,
)
from k3sagentd.k3s.stand_down import asked_for
from k3sagentd.k3s.work import Work

MEMBERS = (Datastore.ETCD, Datastore.AGENT)
FOLLOWED = ("server", *dropin.ADDRESS)
"""What an agent reads at its start only, and has to follow (K3S.md 8)."""


def install(work: Work) -> None:
    """From here on a K3s on this machine is ours."""
    work.paths.installed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"epoch": work.order.epoch, "role": work.order.role}) + "\n"
    write(work.paths.installed, text.encode(), 0o600)
    work.install.install(work.order)


def check_may_start(work: Work) -> None:
    """Raise MachineError for an INIT that would found a second cluster: of a removed member, or
    where the cluster is there and its data is not."""
    data, order = work.paths.k3s_data, work.order
    if order.action is not Action.INIT:
        return
    if is_removed(data):
        raise MachineError(
            f"this server was removed from its cluster ({data} has a tombstone); it waits for one "
            "of the cluster's servers to join it again"
        )
    if order.ca_hash is not None and datastore(data) not in (Datastore.ETCD, Datastore.SQLITE):
        raise MachineError(
            f"this server's cluster exists (CA {order.ca_hash[:12]}), and its data is not in "
            f"{data}: bring it back (is a disk not mounted?), or power on another of its servers; "
            "if it is lost for good, k3sagentd cluster-init --force"
        )


def make(work: Work, server: str | None) -> Iterator[str]:
    """Make this machine's K3s what the order says; ``server`` is the address that was checked."""
    is_server = work.order.role is ServerOrAgent.SERVER and work.tokens is not None
    accepted = work.tokens.accepted if is_server and work.tokens is not None else ()
    sites = [keys.derive(token).site_id for token in accepted]
    yield "choose K3s's token"
    given = credentials.choose(work.order, server, work.tokens, work.paths)
    yield from _make(work, given, given.server or server, tuple(map(keys.mdns_name, sites)))
    if not sites or work.config.virtual_ip is None:
        keepalived.withdraw(work.config, work.paths)
        return
    yield "give the virtual address to keepalived"
    at = attachment(work.config.interface, work.config.virtual_ip)
    keepalived.keep(work.config, work.paths, at, sites[0], work.order)


def _make(
    work: Work, given: Credentials, server: str | None, names: tuple[str, ...]
) -> Iterator[str]:
    paths, order, data = work.paths, work.order, work.paths.k3s_data
    if order.role is ServerOrAgent.SERVER and is_removed(data):
        check_may_start(work)  # again: K3s may have learned of it since
        yield "move the data of the removed member aside"
        work.install.stop()
        put_aside(data / ETCD, "etcd.removed")
    member = datastore(data) in MEMBERS and not is_change(work)
    begins = not member or not work.install.installed(order.role)
    fresh = begins or work.install.owes_start(order.role)
    if begins:
        yield "install K3s without starting it"
        install(work)
    if order.action is Action.JOIN:
        yield from change(work)
    converts = order.action is Action.INIT and (
        datastore(data) is Datastore.SQLITE or paths.converting.exists()
    )
    if converts:
        check_conversion(work)
        begin_conversion(paths)
    yield "write K3s's configuration"
    data.mkdir(parents=True, exist_ok=True)
    if order.action is Action.INIT and datastore(data) is Datastore.NONE:
        write_marker(data, asked_for(work))
        paths.served.unlink(missing_ok=True)  # this word founds a cluster, whatever was here before
    _write(work, given, server, names)
    yield "check what K3s will read"
    dropin.check(order, server, paths, agent_token=given.agent_token is not None)
    if converts:
        yield from convert(work)
        paths.restart.unlink(missing_ok=True)
    yield "start K3s"
    running = work.install.running()
    # systemd started a member with the machine, and who stopped it since, or has it start no more,
    # did so on purpose. What we have installed is enabled by this, also where it runs already.
    if fresh or not work.install.starts_at_boot:
        work.install.start(order.role)
    if running and paths.restart.exists():
        work.install.restart(order.role)
    paths.restart.unlink(missing_ok=True)


def _write(work: Work, given: Credentials, server: str | None, names: tuple[str, ...]) -> None:
    """Token files and drop-in; what must be followed by a restart says so first, lest a kill in
    between lose it."""
    paths, order = work.paths, work.order
    own_token = given.agent_token is not None
    running = work.install.running()
    paths.dropin.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if own_token:
        write(paths.k3s_agent_token, f"{given.agent_token}\n".encode(), 0o600)
    token_changed = write(paths.k3s_token, f"{given.token}\n".encode(), 0o600)
    if running and token_changed and credentials.is_stuck(order.role):
        # An agent reads its token once, and asks with it for ever (K3S.md 8).
        paths.restart.touch()
    before = dropin.present(paths)
    at = attachment(work.config.interface, work.config.virtual_ip)
    values = dropin.contents(order, server, work.config, paths, at, names, agent_token=own_token)
    if running and _needs_restart(work, before, values):
        paths.restart.touch()
    write(paths.dropin, dropin.render(values), 0o600)
    if not own_token:
        paths.k3s_agent_token.unlink(missing_ok=True)


def _needs_restart(work: Work, before: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    if datastore(work.paths.k3s_data) not in MEMBERS:
        # It runs with an older word, and has not come into any cluster by it.
        return before != values
    agent = work.order.role is ServerOrAgent.AGENT
    return agent and any(before.get(key) != values.get(key) for key in FOLLOWED)
