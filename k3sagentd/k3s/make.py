# SPDX-License-Identifier: Apache-2.0
"""Root's orders INIT and JOIN where K3s is ours: install, configure, check, start.

Everything that K3s must know is on the disk before it first starts, and is read back as K3s will
read it. A server that runs is never restarted for a changed ``server:``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from k3sagentd.core.k3s import Action, Datastore, ServerOrAgent
from k3sagentd.discovery.addresses import attachment
from k3sagentd.k3s import dropin
from k3sagentd.k3s.change_role import change, is_change
from k3sagentd.k3s.convert import check as check_conversion
from k3sagentd.k3s.convert import convert
from k3sagentd.k3s.data import datastore, write, write_marker
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


def make(work: Work, server: str | None) -> Iterator[str]:
    """Make this machine's K3s what the order says; ``server`` is the address that was checked."""
    paths, order, data = work.paths, work.order, work.paths.k3s_data
    if is_change(work) or datastore(data) not in MEMBERS or not work.install.running():
        yield "install K3s without starting it"
        install(work)
    if order.action is Action.JOIN:
        yield from change(work)
    converts = order.action is Action.INIT and (
        datastore(data) is Datastore.SQLITE or paths.converting.exists()
    )
    if converts:
        check_conversion(work)
    yield "write K3s's configuration"
    data.mkdir(parents=True, exist_ok=True)
    if order.action is Action.INIT and datastore(data) is Datastore.NONE:
        write_marker(data, asked_for(work))
    _write(work, server)
    yield "check what K3s will read"
    dropin.check(order, server, paths)
    if converts:
        yield from convert(work)
        return
    yield "start K3s"
    if not work.install.running():
        work.install.start(order.role)
    elif paths.restart.exists():
        work.install.restart(order.role)
    paths.restart.unlink(missing_ok=True)


def _write(work: Work, server: str | None) -> None:
    """Token file and drop-in; what must be followed by a restart says so first, lest a kill in
    between lose it."""
    paths, order = work.paths, work.order
    secret = dropin.secure_token(order, work.token) + "\n"
    paths.dropin.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write(paths.k3s_token, secret.encode(), 0o600)
    before = dropin.present(paths)
    at = attachment(work.config.interface)
    values = dropin.contents(order, server, work.config, paths, at)
    if work.install.running() and _needs_restart(work, before, values):
        paths.restart.touch()
    write(paths.dropin, dropin.render(values), 0o600)


def _needs_restart(work: Work, before: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    if datastore(work.paths.k3s_data) not in MEMBERS:
        # It runs with an older word, and has not come into any cluster by it.
        return before != values
    agent = work.order.role is ServerOrAgent.AGENT
    return agent and any(before.get(key) != values.get(key) for key in FOLLOWED)
