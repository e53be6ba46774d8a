# SPDX-License-Identifier: Apache-2.0
"""Which tokens K3s is given here: servers the server token, agents the agent token.

A cluster may run without an agent token (one that was there before the site), and while the site's
token is rotated some servers go by the new one and some by the old. So whoever joins asks what is
taken: on ``/v1-k3s/config`` user ``node`` gets 200, user ``server`` 403, and a wrong password 401
(K3S.md 2). A token is only sent to a server whose certificate is of the CA that was sealed.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from k3sagentd import keys
from k3sagentd.core.k3s import Action, Datastore, Order, ServerOrAgent
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.files import read_bounded
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.data import datastore
from k3sagentd.k3s.trust import NO_ANSWER, insecure, trusting
from k3sagentd.paths import Paths
from k3sagentd.site_token import Tokens

log = logging.getLogger(__name__)

MEMBER_OF = {Datastore.ETCD: ServerOrAgent.SERVER, Datastore.AGENT: ServerOrAgent.AGENT}
TIMEOUT_S = 10.0
CACERTS_LIMIT_BYTES = 256 * 1024
SECRET_LIMIT_BYTES = 16 * 1024
HEALTHZ = "http://127.0.0.1:10248/healthz"
"""The kubelet's (Kubernetes, ``--healthz-port``)."""
HEALTHZ_TIMEOUT_S = 5.0
BUSY_S = 1.0
BUSY_LIMIT = 15
"""K3s answers 429 beyond 20 at a time, and wants to be asked again after a second (K3S.md 3)."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What stands in the files that K3s reads its tokens from."""

    token: str
    """``token-file``."""
    agent_token: str | None = None
    """``agent-token-file``, on a server; None: the cluster runs without."""
    server: str | None = None
    """The registration address that takes them, where one was asked."""


def choose(order: Order, server: str | None, tokens: Tokens | None, paths: Paths) -> Credentials:
    """The tokens for ``order``; ``server`` is the first address with the right CA.

    Raises MachineError where nothing that this machine has is taken, or nobody can say.
    """
    if tokens is None:
        return _kept(order, paths)
    if order.action is not Action.JOIN:
        return _for_init(tokens, paths)
    member = MEMBER_OF.get(datastore(paths.k3s_data)) is order.role
    urls = dict.fromkeys(url for url in (server, *order.servers) if url is not None)
    try:
        if order.role is ServerOrAgent.AGENT:
            return _for_agent(order, list(urls), tokens)
        return _for_server(order, list(urls), tokens, paths)
    except MachineError as error:
        now = _now(order, paths) if member else None
        if now is None:
            raise
        # It is in the cluster: what it has may be right, and there is nothing better.
        log.warning("K3s's token stays as it is: %s", error)
        return now


def is_stuck(role: ServerOrAgent) -> bool:
    """Whether K3s is an agent whose kubelet does not run: a restart interrupts nothing."""
    if role is ServerOrAgent.SERVER:
        return False
    try:
        with urllib.request.urlopen(HEALTHZ, timeout=HEALTHZ_TIMEOUT_S):
            return False
    except urllib.error.HTTPError:
        return False
    except NO_ANSWER:
        return True


# --- each role ------------------------------------------------------------------------------


def _for_init(tokens: Tokens, paths: Paths) -> Credentials:
    """The first server needs the short form (K3S.md 2), and goes on with what it has."""
    if datastore(paths.k3s_data) is Datastore.NONE:
        return Credentials(tokens.shown.decode(), _agent_token(tokens.shown))
    token = _own(tokens, paths) or _given(tokens, paths) or tokens.shown
    agent_token = _agent_token(token) if paths.k3s_agent_token.exists() else None
    return Credentials(token.decode(), agent_token)


def _for_agent(order: Order, urls: list[str], tokens: Tokens) -> Credentials:
    passwords = [_agent_token(each) for each in tokens.newest_first]
    passwords += [each.decode() for each in tokens.newest_first]
    url, password = _first_taken(order, urls, "node", passwords)
    user = "node" if password in passwords[: len(passwords) // 2] else "server"
    return Credentials(secure(order, user, password), server=url)


def _for_server(order: Order, urls: list[str], tokens: Tokens, paths: Paths) -> Credentials:
    """The newest token that a server goes by: K3s goes from one to the next, never back."""
    candidates = list(tokens.newest_first)
    own = _own(tokens, paths)
    if own is not None:  # its own K3s has gone as far as this, so nothing older counts
        candidates = candidates[: candidates.index(own) + 1]
    if len(candidates) == 1:
        url, token = None, candidates[0]
    else:
        try:
            passwords = [each.decode() for each in candidates]
            url, password = _first_taken(order, urls, "server", passwords)
            token = password.encode()
        except MachineError:
            if own is None:
                raise
            url, token = None, own
    choices = (_agent_token(token), token.decode())
    try:
        asked = [url] if url is not None else urls
        url, password = _first_taken(order, asked, "node", choices)
        agent_token = choices[0] if password == choices[0] else None
    except MachineError:
        if own is None:
            raise
        agent_token = choices[0] if paths.k3s_agent_token.exists() else None
    return Credentials(secure(order, "server", token.decode()), agent_token, url)


def _kept(order: Order, paths: Paths) -> Credentials:
    """Without the token: K3s's own files must do."""
    agent = order.action is Action.JOIN and order.role is ServerOrAgent.AGENT
    now = _now(order, paths) if agent else None
    if now is None or datastore(paths.k3s_data) is not Datastore.AGENT:
        raise HopelessError(
            f"this machine forgot the site's token ({paths.token_forgotten}) and can only be the "
            "agent that it was; give it the token again"
        )
    return now


# --- what is there --------------------------------------------------------------------------


def _now(order: Order, paths: Paths) -> Credentials | None:
    """What K3s is given now; None where it is given nothing."""
    token = _text(paths.k3s_token)
    if token is None:
        return None
    server = order.role is ServerOrAgent.SERVER
    return Credentials(token, _text(paths.k3s_agent_token) if server else None)


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return read_bounded(path, SECRET_LIMIT_BYTES).decode().strip()
    return None


def _own(tokens: Tokens, paths: Paths) -> bytes | None:
    """The token that K3s itself wrote down: at its start, or when it was told to rotate.

    Raises HopelessError for one that is not the site's: with another, K3s would not start again.
    """
    text = _text(paths.k3s_own_token)
    found = _known(tokens, text)
    if text is not None and found is None:
        raise HopelessError(
            f"{paths.k3s_own_token} has another token than the site, and K3s does not start with "
            "another; make its last part, behind the colon, the token of every machine of the site"
        )
    return found


def _given(tokens: Tokens, paths: Paths) -> bytes | None:
    """The token that K3s is given."""
    return _known(tokens, _text(paths.k3s_token))


def _known(tokens: Tokens, text: str | None) -> bytes | None:
    password = (text or "").rpartition(":")[2].encode()
    return password if password in tokens.accepted else None


@functools.cache
def _agent_token(token: bytes) -> str:
    return keys.derive(token).agent_token


def secure(order: Order, user: str, password: str) -> str:
    """The form that is bound to the CA (K3S.md 2)."""
    return f"K10{order.ca_hash}::{user}:{password}"


# --- asking ---------------------------------------------------------------------------------


def _first_taken(
    order: Order, urls: Iterable[str], user: str, passwords: Iterable[str]
) -> tuple[str, str]:
    """The first password that a server takes, and the server; raises MachineError."""
    authorities: dict[str, ssl.SSLContext] = {}
    reasons: list[str] = []
    for url in urls:
        try:
            authorities[url] = _trusting(url, str(order.ca_hash))
        except MachineError as error:
            reasons.append(str(error))
    refused = []
    for password in passwords:
        for url, context in authorities.items():
            try:
                if takes(url, context, user, password):
                    return url, password
                refused.append(url)
            except MachineError as error:
                reasons.append(str(error))
    if refused:
        reasons.append(f"{refused[0]} takes no token that this machine has; has the site another?")
    raise MachineError("; ".join(dict.fromkeys(reasons)) or "there is no server to ask")


def takes(url: str, context: ssl.SSLContext, user: str, password: str) -> bool:
    """Whether a server takes ``password`` for ``user``; raises MachineError if it does not say."""
    text = base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(  # noqa: S310 (https only: order.check_url)
        f"{url}/v1-k3s/config", headers={"Authorization": f"Basic {text}"}
    )
    for _ in range(BUSY_LIMIT):
        status = _status(request, context)
        if status != 429:
            break
        time.sleep(BUSY_S * random.uniform(1, 3))  # noqa: S311 (jitter)
    if status in (200, 401, 403):
        return status == 200 or (status == 403 and user == "server")
    raise MachineError(f"{url} answers {status}")


def _status(request: urllib.request.Request, context: ssl.SSLContext) -> int:
    try:
        with _opener(context).open(request, timeout=TIMEOUT_S) as response:
            status: int = response.status
    except urllib.error.HTTPError as error:
        return error.code
    except NO_ANSWER as error:
        reason = getattr(error, "reason", error)
        raise MachineError(f"{request.host} cannot be asked: {reason}") from error
    return status


def _trusting(url: str, ca_hash: str) -> ssl.SSLContext:
    """Trusts the CA of the cluster alone, which is fetched and known by its hash."""
    try:
        with _opener(insecure()).open(f"{url}/cacerts", timeout=TIMEOUT_S) as response:
            body = response.read(CACERTS_LIMIT_BYTES)
    except NO_ANSWER as error:
        raise MachineError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
    if (found := hash_of_cacerts(body)) != ca_hash:
        raise MachineError(f"{url} has CA {found}, but the site's is {ca_hash}")
    try:
        return trusting(body)
    except (ssl.SSLError, ValueError) as error:
        raise MachineError(f"{url}/cacerts cannot be trusted: {error}") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes where it was meant to go."""

    def redirect_request(self, *_: object) -> None:
        """None: the redirection is an answer like any other."""


def _opener(context: ssl.SSLContext) -> urllib.request.OpenerDirector:
    """Straight to the server: neither proxies nor redirections see a token."""
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=context),
        _NoRedirect(),
    )
