# SPDX-License-Identifier: Apache-2.0
"""Root's side of ``forget-token``: wipe the site's token from an agent that can go on without.

The daemon asks by a file that says nothing; whether it is right is seen here, from what root
configured and what K3s left. Whoever takes over the daemon can at most have a token wiped that
its owner wanted to be wiped, from an agent whose K3s runs.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import time
import urllib.error
from collections.abc import Iterable, Iterator
from pathlib import Path

from k3sagentd import keys, membership, site_token
from k3sagentd.config import Config, load_config
from k3sagentd.core.k3s import Datastore
from k3sagentd.errors import K3sagentdError, MachineError, fault
from k3sagentd.files import finish_wipe, wipe, write_atomically
from k3sagentd.identity import node_id_in
from k3sagentd.k3s.credentials import HEALTHZ, HEALTHZ_TIMEOUT_S
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.install import Method, method
from k3sagentd.k3s.trust import no_http, straight
from k3sagentd.paths import Paths

log = logging.getLogger(__name__)

NOTE = """\
This machine had the token of site {site} until {when}. It is an agent of the site's cluster and
does not need it any more (forget-token, k3sagentd-config(5)). To make it a server, set
forget-token: false and put the token into {token} again.
"""
KEEPERS_LIMIT_BYTES = 64 * 1024
SERVERS = ("*/server*", "*/*/server*", "*/server*/*")
"""Beside K3s's data: a server's part, also of one that became an agent (``change_role``) or whose
data went aside, beside or inside what it was (``data.put_aside``)."""


def forget(paths: Paths) -> None:
    """Carry out the daemon's request, if there is one; the answer is empty once it is done.

    What a wipe that was cut off left of a token goes in any case: who has no token asks no more.
    """
    try:
        paths.forget.unlink()
    except FileNotFoundError:
        with contextlib.suppress(K3sagentdError, OSError):
            _finish_wipes(load_config(paths))
        return
    try:
        config = load_config(paths)
        _forget(config, paths, method(config, paths))
        reason = ""
    except (K3sagentdError, OSError) as error:
        reason = str(error)
        log.warning("the token is not wiped: %s", reason)
    except Exception as error:
        reason = fault(error)
        log.exception("the token is not wiped")
    write_atomically(paths.forget_result, reason.encode(), durable=False)


def _finish_wipes(config: Config) -> None:
    for each in site_token.files(config.token_file):
        if finish_wipe(each):
            log.warning("%s: its wipe, which was cut off, is finished", each)


def _forget(config: Config, paths: Paths, install: Method) -> None:
    _finish_wipes(config)
    if not config.forget_token:
        raise MachineError("forget-token is not set")
    _check_agent(paths, install)
    files = [each for each in site_token.files(config.token_file) if each.exists()]
    if not files:
        return
    tokens = site_token.load_all(config.token_file)
    if len(tokens.accepted) > 1:
        raise MachineError("a rotation is under way: k3sagentd token forget ends it")
    _check_needless(paths, tokens.shown)
    derived = keys.derive(tokens.shown)
    _check_kept(paths, derived)
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    note = NOTE.format(site=derived.site_id, when=when, token=config.token_file)
    # The note first: a power cut must not leave a machine with neither, which would not start.
    write_atomically(paths.token_forgotten, note.encode())
    for file in files:
        wipe(file)
    log.warning("the token of site %s is wiped from this machine", derived.site_id)


def _check_agent(paths: Paths, install: Method) -> None:
    """K3s runs here as an agent, and never was a server."""
    found = datastore(paths.k3s_data)
    if found is not Datastore.AGENT or (paths.k3s_data / "server").exists():
        raise MachineError(f"{paths.k3s_data} is not that of an agent")
    if not install.running():
        raise MachineError("K3s does not run here")
    try:
        with straight().open(HEALTHZ, timeout=HEALTHZ_TIMEOUT_S) as response:
            status = response.status
    except (urllib.error.URLError, OSError) as error:
        raise MachineError(f"the kubelet does not answer: {error}") from error
    except http.client.HTTPException as error:
        raise MachineError(f"the kubelet ({HEALTHZ}): {no_http(error)}") from error
    if status != 200:
        raise MachineError(f"the kubelet answers {status}")


def _check_needless(paths: Paths, token: bytes) -> None:
    """K3s here has no use for the token: what it is given does not hold it."""
    for file in _keepers(paths):
        with contextlib.suppress(FileNotFoundError):
            if token in file.read_bytes()[:KEEPERS_LIMIT_BYTES]:
                raise MachineError(f"{file} has it too{_why(file, paths)}")


def _why(file: Path, paths: Paths) -> str:
    if file == paths.k3s_token:
        return ": the cluster runs without an agent token, so its agents need the server token"
    if paths.k3s_data.parent in file.parents:
        return ": this machine was a server; remove the data that was moved aside"
    return "; remove it there"


def _keepers(paths: Paths) -> Iterator[Path]:
    """Every file from which K3s takes its configuration, and what it left as a server."""
    directory = paths.k3s_config.parent
    found: Iterable[Path] = directory.rglob("*") if directory.is_dir() else ()
    yield from sorted(each for each in found if each.is_file())
    yield from sorted((paths.root / "etc/systemd/system").glob("k3s*.env"))
    for name, place in itertools.product(("token", "cred/passwd"), SERVERS):
        yield from sorted(paths.k3s_data.parent.glob(f"{place}/{name}"))


def _check_kept(paths: Paths, derived: keys.SiteKeys) -> None:
    """The daemon kept what it needs to start again, made by this very token."""
    kept = membership.read_kept(paths.state)
    membership.check(kept, node_id_in(paths.state))
    if kept.site_id != derived.site_id or kept.authorities != membership.pems(
        (derived.ca_certificate,)
    ):
        raise MachineError(f"{paths.state / membership.KEPT_FILE} is of another site")
