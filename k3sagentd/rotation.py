# SPDX-License-Identifier: Apache-2.0
"""A new token for a site, without rebuilding it: old and new are taken for a while.

Three files: ``token`` is shown, ``token.next`` and ``token.previous`` are taken as well. All
machines get ``token.next``; then each goes over; when all have, they forget ``token.previous``.
At every instant the files on a machine stand for one of these states, also after a power cut.
"""

from __future__ import annotations

from pathlib import Path

from k3sagentd import site_token, store
from k3sagentd.core.log import seal_of
from k3sagentd.errors import ConfigError, DataError, UsageError
from k3sagentd.files import finish_wipe, fsync_directory, read_bounded, wipe, write_atomically
from k3sagentd.identity import node_id_in
from k3sagentd.paths import Paths
from k3sagentd.site_token import next_path, previous_path

LIMIT_BYTES = 16 * 1024

CREATED = """\
{next}: made. Now:
1. Copy it, mode 0600, to every other machine of the site, and on each, this one too:
     systemctl restart k3sagentd
   From then on each takes both tokens.
2. When k3sagentd status shows all machines on each of them: k3sagentd token rotate, on a server."""
ROTATED = """\
{token} is the new token; the old one, in {previous}, is still taken. Now:
1. On the first server tell K3s (1.28 or later), once for the whole cluster:
     k3s token rotate --token "$(cat {previous})" --new-token "$(cat {token})"
2. On every server, this one first, one at a time:
     k3sagentd token rotate; systemctl restart k3sagentd; k3sagentd wait --for joined
     systemctl restart k3s
   and wait until it is Ready again (k3s kubectl get nodes) before the next.
3. On every agent: k3sagentd token rotate; systemctl restart k3sagentd
4. When k3sagentd status shows all machines on each of them: k3sagentd token forget, on all."""
FORGOTTEN = """\
{previous} was overwritten and removed. systemctl restart k3sagentd: it takes the new token alone.
Snapshots of etcd from before the rotation need the old token: keep it where you keep them."""


def create_next(paths: Paths, token_file: Path) -> str:
    """Make the token that the site is to go to; returns what to do then. Raises ConfigError."""
    site_token.load(token_file)
    _check_sealed(paths)
    if previous_path(token_file).exists():
        raise ConfigError(
            f"{previous_path(token_file)}: the last rotation is not over; end it with k3sagentd "
            "token forget on every machine"
        )
    site_token.create(next_path(token_file))
    return CREATED.format(next=next_path(token_file))


def rotate(paths: Paths, token_file: Path) -> str:
    """Show the next token, and go on taking the one before; returns what to do then.

    Raises ConfigError. Given again after a kill it goes on where it was.
    """
    tokens = site_token.load_all(token_file)
    names = {"token": token_file, "previous": previous_path(token_file)}
    if tokens.next is None:
        if tokens.previous is None:
            raise ConfigError(
                f"{next_path(token_file)}: no such file; make it with k3sagentd token create "
                "--next on one machine, and copy it to all"
            )
        return ROTATED.format(**names)
    _check_sealed(paths)
    if tokens.next != tokens.shown:
        if tokens.previous not in (None, tokens.shown):
            raise ConfigError(
                f"{previous_path(token_file)}: the rotation before is not over; end it with "
                "k3sagentd token forget on every machine"
            )
        # Before the token changes: at no instant is the one before it not taken.
        write_atomically(previous_path(token_file), tokens.shown + b"\n", mode=0o600)
    next_path(token_file).rename(token_file)
    fsync_directory(token_file.parent)
    return ROTATED.format(**names)


def forget_previous(paths: Paths, token_file: Path) -> str:
    """Take the old token no more; returns what to do then. Raises ConfigError, UsageError.

    Given again after a kill it goes on where it was.
    """
    previous = previous_path(token_file)
    finished = finish_wipe(previous)
    tokens = site_token.load_all(token_file)
    if tokens.previous is None:
        if finished:
            return FORGOTTEN.format(previous=previous)
        return f"{previous}: is not there; nothing to forget"
    for file in (paths.k3s_own_token, paths.k3s_token):
        if tokens.previous != tokens.shown and _has(file, tokens.previous):
            raise UsageError(
                f"{file} still has the old token: K3s on this machine has not gone over; "
                "k3sagentd token rotate says how"
            )
    wipe(previous)
    return FORGOTTEN.format(previous=previous)


def _has(file: Path, token: bytes) -> bool:
    try:
        return token in read_bounded(file, LIMIT_BYTES)
    except FileNotFoundError:
        return False


def _check_sealed(paths: Paths) -> None:
    """Raise UsageError before the seal: who is nominated depends on the token."""
    if not _is_sealed(paths):
        raise UsageError(
            "the site is not sealed as far as this machine knows (k3sagentd status), and its "
            "machines elect by the token. Wait for that; or, while there is no cluster, stop "
            "k3sagentd on all machines, replace the token on all, and start it again"
        )


def _is_sealed(paths: Paths) -> bool:
    """By what is on the disk: the daemon need not run."""
    try:
        data = read_bounded(paths.state / store.FILE_NAME, store.SIZE_LIMIT_BYTES)
        durable, _ = store.restore(data, node_id_in(paths.state))
    except (DataError, FileNotFoundError):
        return False
    return seal_of(durable.log) is not None
