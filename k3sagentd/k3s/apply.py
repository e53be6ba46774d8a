# SPDX-License-Identifier: Apache-2.0
"""Root's part: take an order, check it, make this machine's K3s so, report step by step.

Everything K3s must know is on the disk before it first starts, and is read back as K3s will
read it. Running an order twice changes nothing. Nothing that K3s wrote is ever deleted.
"""

from __future__ import annotations

import fcntl
import json
import logging
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from k3sagentd.config import Config, load_config
from k3sagentd.core.k3s import Action, Datastore, Order, Outcome, Result, ServerOrAgent
from k3sagentd.discovery.addresses import attachment
from k3sagentd.errors import ConfigError, HopelessError, K3sagentdError, MachineError
from k3sagentd.files import fsync_directory, write_atomically
from k3sagentd.k3s import credentials, dropin, facts, order, probe
from k3sagentd.k3s.clock import Clock
from k3sagentd.k3s.forget import forget
from k3sagentd.k3s.install import Method, method
from k3sagentd.k3s.preflight import preflight
from k3sagentd.paths import Paths
from k3sagentd.site_token import Tokens, load_unless_forgotten

log = logging.getLogger(__name__)

CACERTS_TIMEOUT_S = 10.0
CACERTS_LIMIT_BYTES = 256 * 1024


def apply(paths: Paths) -> int:
    """Carry out the order that is there, if any; the exit code says whether it was done."""
    paths.run.mkdir(parents=True, exist_ok=True)
    paths.root_run.mkdir(mode=0o700, parents=True, exist_ok=True)
    with paths.apply_lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken = order.take_order(paths)
        code = 0 if taken is None else Apply(paths, taken).run()
        forget(paths)
        return code


class Apply:
    """One order being carried out."""

    def __init__(self, paths: Paths, what: Order) -> None:
        self._paths = paths
        self._order = what
        self._server: str | None = None

    def run(self) -> int:
        """Do each step, reporting it first; the last report is the outcome."""
        step = "read the configuration"
        try:
            config = load_config(self._paths)
            tokens = load_unless_forgotten(config.token_file, self._paths.token_forgotten)
            install = method(config, self._paths)
            for step in self._steps(config, tokens, install):
                log.info("%s: %s", self._order.action, step)
                self._report(Outcome.RUNNING, step)
        except (HopelessError, ConfigError) as error:
            return self._failed(Outcome.FAILED_FOR_GOOD, step, str(error))
        except (K3sagentdError, OSError) as error:
            return self._failed(Outcome.FAILED, step, str(error))
        facts.write_facts(self._paths)
        self._report(Outcome.DONE, step)
        return 0

    def _report(self, outcome: Outcome, step: str, reason: str | None = None) -> None:
        result = Result(order=self._order, outcome=outcome, step=step, reason=reason)
        order.write_result(self._paths, result)

    def _failed(self, outcome: Outcome, step: str, reason: str) -> int:
        log.error("%s failed at «%s»: %s", self._order.action, step, reason)
        self._report(outcome, step, reason)
        return 1

    # --- the orders -------------------------------------------------------------------------

    def _steps(self, config: Config, tokens: Tokens | None, install: Method) -> Iterator[str]:
        """Yield each step's name before it is done."""
        match self._order.action:
            case Action.INIT:
                yield "check this machine"
                self._check_init()
                yield from self._preflight(config, install)
                yield from self._make(config, tokens, install)
            case Action.PREPARE:
                yield "check this machine"
                self._check_join()
                yield from self._preflight(config, install)
                yield "install K3s without starting it"
                self._install(install)
            case Action.JOIN:
                yield "check this machine"
                self._check_join()
                yield "check the registration address"
                self._server = self._find_server()
                yield from self._make(config, tokens, install)
            case Action.STAND_DOWN:
                yield "check whose data it is"
                if self._is_ours():
                    yield "stop K3s"
                    install.stop()
                    yield "move its data aside"
                    self._move_aside()

    def _preflight(self, config: Config, install: Method) -> Iterator[str]:
        if not install.running():
            yield from preflight(config, self._paths, self._order.role, Clock())

    def _install(self, install: Method) -> None:
        """From here on a K3s on this machine is ours."""
        self._paths.installed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({"epoch": self._order.epoch, "role": self._order.role}) + "\n"
        _write(self._paths.installed, text.encode(), 0o600)
        install.install(self._order)

    def _make(self, config: Config, tokens: Tokens | None, install: Method) -> Iterator[str]:
        paths, data = self._paths, self._paths.k3s_data
        member = facts.datastore(data) in (Datastore.ETCD, Datastore.AGENT)
        yield "choose K3s's token"
        given = credentials.choose(self._order, self._server, tokens, paths)
        self._server = given.server or self._server
        if not (member and install.running()):
            yield "install K3s without starting it"
            self._install(install)
        yield "write K3s's configuration"
        data.mkdir(parents=True, exist_ok=True)
        if self._order.action is Action.INIT and facts.datastore(data) is Datastore.NONE:
            marker = json.dumps({"epoch": self._order.epoch}) + "\n"
            _write(data / facts.MARKER, marker.encode(), 0o644)
        paths.dropin.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        own_token = given.agent_token is not None
        if own_token:
            _write(paths.k3s_agent_token, f"{given.agent_token}\n".encode(), 0o600)
        token_changed = _write(paths.k3s_token, f"{given.token}\n".encode(), 0o600)
        at = attachment(config.interface)
        values = dropin.contents(
            self._order, self._server, config, paths, at, agent_token=own_token
        )
        changed = _write(paths.dropin, dropin.render(values), 0o600)
        if not own_token:
            paths.k3s_agent_token.unlink(missing_ok=True)
        yield "check what K3s will read"
        dropin.check(self._order, self._server, paths, agent_token=own_token)
        yield "start K3s"
        if not install.running():
            install.start(self._order.role)
        elif changed and not member:
            # It runs with an older word, and has not come into any cluster by it.
            install.restart(self._order.role)
        elif token_changed and credentials.is_stuck(self._order.role):
            # An agent reads its token once, and asks with it for ever (K3S.md 8).
            install.restart(self._order.role)

    def _check_init(self) -> None:
        found = facts.datastore(self._paths.k3s_data)
        origin = facts.read_marker(self._paths.k3s_data)
        if found is Datastore.AGENT:
            raise HopelessError(
                f"{self._paths.k3s_data} has the data of an agent of another cluster; move it aside"
            )
        if origin is not None and origin != self._order.epoch:
            raise HopelessError(
                f"{self._paths.k3s_data} was made for epoch {origin}, this is epoch "
                f"{self._order.epoch}; move it aside"
            )

    def _check_join(self) -> None:
        found = facts.datastore(self._paths.k3s_data)
        if found is Datastore.SQLITE:
            raise HopelessError(
                f"{self._paths.k3s_data} has a single-node cluster of its own (SQLite); move it "
                "aside to join the site"
            )
        if found is Datastore.ETCD and self._order.role is ServerOrAgent.AGENT:
            raise HopelessError(f"{self._paths.k3s_data} has the data of a server; move it aside")

    def _find_server(self) -> str:
        """The first address whose CA is the one that was sealed."""
        member = facts.datastore(self._paths.k3s_data) in (Datastore.ETCD, Datastore.AGENT)
        reasons = []
        for url in self._order.servers:
            try:
                found = fetch_ca_hash(url)
            except MachineError as error:
                reasons.append(str(error))
                continue
            if found == self._order.ca_hash:
                return url
            reasons.append(f"{url} has CA {found}, but the site's is {self._order.ca_hash}")
        if member:
            return self._order.servers[0]  # it has its own members to ask; this is not used
        raise MachineError("; ".join(reasons))

    def _is_ours(self) -> bool:
        """Whether the data was made by our order; what was there before us stays as it is."""
        data = self._paths.k3s_data
        origin = facts.read_marker(data)
        if origin is not None and origin != self._order.epoch:
            raise HopelessError(f"{data} is of epoch {origin}, not of {self._order.epoch}")
        if origin is None and facts.datastore(data) is not Datastore.NONE:
            log.warning("%s was there before the site and stays as it is", data)
            return False
        return True

    def _move_aside(self) -> None:
        paths, data = self._paths, self._paths.k3s_data
        if facts.read_marker(data) is not None:
            aside = data.with_name(f"{data.name}.abandoned-{self._order.epoch}")
            number = 2
            while aside.exists():
                aside = data.with_name(f"{data.name}.abandoned-{self._order.epoch}-{number}")
                number += 1
            data.rename(aside)
            fsync_directory(data.parent)
            log.warning("K3s's data is in %s now", aside)
        for path in (paths.dropin, paths.k3s_token, paths.k3s_agent_token):
            path.unlink(missing_ok=True)


def fetch_ca_hash(url: str) -> str:
    """The hash of a server's CA; raises MachineError where it has none to show."""
    context: ssl.SSLContext = probe.insecure()
    try:
        with urllib.request.urlopen(  # noqa: S310 (https only: order.check_url)
            f"{url}/cacerts", timeout=CACERTS_TIMEOUT_S, context=context
        ) as response:
            body = response.read(CACERTS_LIMIT_BYTES)
    except urllib.error.HTTPError as error:
        raise MachineError(f"{url} answers {error.code}") from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise MachineError(f"{url} cannot be reached: {reason}") from error
    found = probe.hash_of_cacerts(body)
    if found is None:
        raise MachineError(f"{url}/cacerts is not a certificate")
    return found


def _write(path: Path, data: bytes, mode: int) -> bool:
    """Write ``path`` unless it says that already; whether it changed."""
    try:
        same = path.read_bytes() == data and path.stat().st_mode & 0o777 == mode
    except OSError:
        same = False
    if not same:
        write_atomically(path, data, mode=mode)
    return not same
