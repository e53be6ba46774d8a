# SPDX-License-Identifier: Apache-2.0
"""Root's orders where K3s was here before us: look, compare, start it if it does not run.

Nothing that such a K3s reads is changed, and it is neither installed nor restarted, with one
exception: a single server with SQLite becomes etcd's first member, for which K3s must be started
once with ``cluster-init``. Only that is said to it, in a drop-in of ours. Were the data lost later,
that word would found a second cluster (and without it K3s would found one with SQLite): so once
other servers are there, the drop-in says ``server`` and ``token-file`` instead, which K3s reads
only where it has no data. A cluster of the operator's own that was etcd before has no drop-in of
ours; what its first server would do without its data stays as the operator set it up.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import Any

from k3sagentd.core.k3s import Action, Datastore, ServerOrAgent
from k3sagentd.errors import ConfigError, HopelessError
from k3sagentd.files import read_bounded
from k3sagentd.k3s import credentials, dropin, facts, flags
from k3sagentd.k3s.convert import begin as begin_conversion
from k3sagentd.k3s.convert import check as check_conversion
from k3sagentd.k3s.convert import convert
from k3sagentd.k3s.data import datastore, is_removed, write
from k3sagentd.k3s.ownership import answers
from k3sagentd.k3s.servers import find
from k3sagentd.k3s.settings import told
from k3sagentd.k3s.work import Work

CONVERSION = frozenset({"cluster-init", "server", "token-file"})
"""All that a drop-in for an adopted K3s may say."""
OTHER_DATASTORE = ("server", "datastore-endpoint", "cluster-reset")
"""With one of these K3s would not convert its SQLite data, but go elsewhere (K3S.md 1)."""
TOKEN_LIMIT_BYTES = 4096


def adopt(work: Work) -> Iterator[str]:
    """INIT, PREPARE or JOIN on a machine whose K3s is adopted; its data allows the order."""
    yield "compare K3s's token with the site's"
    check_token(work)
    check_not_removed(work)  # again: K3s may have learned of it since
    if work.order.action in (Action.PREPARE, Action.STEP_DOWN):
        return
    store = datastore(work.paths.k3s_data)
    if store is Datastore.SQLITE or work.paths.converting.exists():
        yield "tell K3s to become a cluster"
        check_conversion(work)
        _say(work, {"cluster-init": True})
        yield from convert(work)
    elif work.order.action is Action.JOIN and _was_converted(work):
        yield "tell K3s of the other servers"
        server = find(work)
        given = credentials.choose(work.order, server, work.tokens, work.paths)
        write(work.paths.k3s_token, f"{given.token}\n".encode(), 0o600)
        _say(work, {"server": server, "token-file": str(work.paths.k3s_token)})
    if not work.install.running() and not answers():
        yield "start K3s as its operator set it up"
        work.install.start(work.order.role, at_boot=False)


def check_not_removed(work: Work) -> None:
    """Raise HopelessError where etcd has removed this server: K3s is not ours to join anew, and by
    its operator's words alone it might found a second cluster (``data.TOMBSTONE``)."""
    if not is_removed(work.paths.k3s_data):
        return
    facts.write_facts(work.paths)  # the others must not count on it any more
    raise HopelessError(
        "etcd removed this server from its cluster, and K3s was here before k3sagentd; run "
        "k3s-uninstall.sh (it deletes K3s and its data here), then systemctl restart k3sagentd, "
        "and this machine joins anew"
    )


def _was_converted(work: Work) -> bool:
    there = dropin.present(work.paths)
    return bool(there) and there.keys() <= CONVERSION


def _say(work: Work, words: dict[str, Any]) -> None:
    """Write a drop-in of these words alone; raises ConfigError where the operator's contradict."""
    paths = work.paths
    theirs = told(paths, ServerOrAgent.SERVER, ours=False)
    for key in OTHER_DATASTORE:
        if theirs.get(key):
            raise ConfigError(
                f"{key} is set for K3s on this machine (in /etc/rancher/k3s or its unit); allowed: "
                "nothing that leads it away from its data; remove it there"
            )
    converts = "cluster-init" in words and not paths.converting.exists()
    if converts:
        begin_conversion(paths)
    paths.dropin.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write(paths.dropin, dropin.render(words), 0o600)
    heard = told(paths, ServerOrAgent.SERVER)
    for key, value in words.items():
        if heard.get(key) != value:
            paths.dropin.unlink()
            if converts:
                paths.converting.unlink()
            raise ConfigError(
                f"{key} is {flags.shown(key, heard.get(key))} for K3s on this machine, whatever "
                f"{paths.dropin} says; allowed: {value!r}; remove it in its unit or in the later "
                "drop-in"
            )


# --- the token ------------------------------------------------------------------------------


def check_token(work: Work) -> None:
    """Raise HopelessError where K3s has another token than the site: it would refuse who joins.

    A server says its own; of an agent's only what is bound to the cluster can be compared, as it
    may have been given the agents' token.
    """
    if work.order.role is ServerOrAgent.SERVER:
        file = work.paths.k3s_data / "server/token"
        try:
            found = read_bounded(file, TOKEN_LIMIT_BYTES).decode(errors="replace").strip()
        except FileNotFoundError:
            return  # K3s has not been ready yet
        _compare(work, found, str(file))
        return
    given, where = _given(work)
    if given is None:
        return
    ca_hash, _, login = given.removeprefix("K10").partition("::")
    if not login or not given.startswith("K10"):
        return
    if work.order.ca_hash is not None and ca_hash != work.order.ca_hash:
        raise HopelessError(
            f"K3s's token in {where} is of the cluster with CA {ca_hash[:12]}, but the site's is "
            f"{work.order.ca_hash[:12]}; uninstall K3s there (k3s-agent-uninstall.sh) to join it"
        )
    if login.startswith("server:"):
        _compare(work, given, where)


def _given(work: Work) -> tuple[str | None, str]:
    options = told(work.paths, ServerOrAgent.AGENT)
    if file := options.get("token-file"):
        try:
            path = work.paths.root / str(file).lstrip("/")
            return read_bounded(path, TOKEN_LIMIT_BYTES).decode(errors="replace").strip(), str(file)
        except OSError:
            return None, str(file)
    token = options.get("token")
    return (str(token) if token else None), "K3s's configuration"


def _compare(work: Work, found: str, where: str) -> None:
    password = found.rpartition(":")[2].encode()
    accepted = work.tokens.accepted if work.tokens is not None else ()
    if accepted and not any(hmac.compare_digest(password, token) for token in accepted):
        raise HopelessError(
            f"K3s's token in {where} is not the site's token, and K3s takes no other: put its "
            f"password (what follows the last colon) into {work.config.token_file} on all machines"
        )
