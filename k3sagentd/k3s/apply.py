# SPDX-License-Identifier: Apache-2.0
"""Root's part: take an order, check it, have it carried out step by step, report each step.

What is done is in the modules of the steps: ``make``, ``adopt``, ``change_role``, ``convert``,
``stand_down``. Running an order twice changes nothing, killed at any point it is finished by the
next run, and nothing that K3s wrote is ever deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Datastore, Order, Outcome, Result
from k3sagentd.errors import ConfigError, HopelessError, K3sagentdError, fault
from k3sagentd.k3s import change_role, errand, facts, keepalived, order, underway
from k3sagentd.k3s.adopt import adopt, check_not_removed
from k3sagentd.k3s.clock import Clock
from k3sagentd.k3s.data import ca_hash, datastore, read_marker
from k3sagentd.k3s.forget import forget
from k3sagentd.k3s.install import method
from k3sagentd.k3s.make import check_may_start, install, make
from k3sagentd.k3s.ownership import is_adopted
from k3sagentd.k3s.preflight import check_foreign, preflight
from k3sagentd.k3s.servers import find
from k3sagentd.k3s.stand_down import asked_for, stand_down
from k3sagentd.k3s.work import Work
from k3sagentd.paths import Paths
from k3sagentd.site_token import load_unless_forgotten

log = logging.getLogger(__name__)


def apply(paths: Paths) -> int:
    """Carry out the order that is there, if any, then the errand, if any.

    The exit code says what became of the order: done, may be tried again (EX_TEMPFAIL), or not
    without a person; what became of the errand is in its result.
    """
    paths.run.mkdir(parents=True, exist_ok=True)
    with underway.alone(paths):
        taken = order.take_order(paths)
        code = 0 if taken is None else _run(paths, taken)
        errand.run(paths)
        forget(paths)
        return code


def _run(paths: Paths, what: Order) -> int:
    """Do each step, reporting it first; the last report is the outcome."""

    def report(outcome: Outcome, reason: str | None = None, *, started: bool = False) -> None:
        result = Result(order=what, outcome=outcome, step=step, reason=reason, started=started)
        order.write_result(paths, result)

    def failed(outcome: Outcome, reason: str) -> int:
        log.error("%s failed at «%s»: %s", what.action, step, reason)
        report(outcome, reason, started=_look_after_failure(paths, work))
        return os.EX_TEMPFAIL if outcome is Outcome.FAILED else os.EX_SOFTWARE

    work = None
    step = "see whether a command of the operator is half done"
    try:
        underway.check(paths)
        step = "read the configuration"
        config = load_config(paths)
        tokens = load_unless_forgotten(config.token_file, paths.token_forgotten)
        tool = method(config, paths)
        work = Work(order=what, config=config, paths=paths, tokens=tokens, install=tool)
        said = ""
        for step in steps(work):
            if step != said:
                log.info("%s: %s", what.action, step)
                report(Outcome.RUNNING)
            said = step
        step = "look at what is there now"
        facts.write_facts(paths)
    except (HopelessError, ConfigError) as error:
        return failed(Outcome.FAILED_FOR_GOOD, str(error))
    except (K3sagentdError, OSError) as error:
        return failed(Outcome.FAILED, str(error))
    except Exception as error:
        log.exception("%s met what nobody foresaw", what.action)
        return failed(Outcome.FAILED, fault(error))
    report(Outcome.DONE)
    return 0


def _look_after_failure(paths: Paths, work: Work | None) -> bool:
    """Write down what is there now, as far as can be seen; whether K3s runs, without data of a role
    as yet, or as what was ordered: the others must know who may be a member of etcd."""
    started = False
    with contextlib.suppress(Exception):  # what is reported is why the order failed
        started = work is not None and work.install.running() and not change_role.is_change(work)
    with contextlib.suppress(Exception):
        facts.write_facts(paths)
    return started


def steps(work: Work) -> Iterator[str]:
    """Yield each step's name before it is done."""
    if work.order.action is Action.STAND_DOWN:
        yield from stand_down(work)
        return
    yield "check this machine"
    if is_adopted(work.paths, work.config):
        check_not_removed(work)
    if work.order.action is Action.INIT:
        _check_init(work)
    else:
        _check_join(work)
    if is_adopted(work.paths, work.config):
        yield from adopt(work)
        return
    match work.order.action:
        case Action.INIT:
            yield from _preflight(work)
            yield from make(work, None)
        case Action.PREPARE:
            yield from _preflight(work)
            yield "install K3s without starting it"
            install(work)
        case Action.JOIN:
            if datastore(work.paths.k3s_data) is Datastore.NONE:
                yield from _preflight(work)
            yield "check the registration address"
            yield from make(work, find(work))
        case Action.STEP_DOWN:
            keepalived.withdraw(work.config, work.paths)
            yield from change_role.change(work)


def _preflight(work: Work) -> Iterator[str]:
    running = work.install.running()
    if not running or change_role.is_change(work):
        keepalived.check(work.config, work.paths, work.order.role)
        clock = None if running else Clock()
        yield from preflight(work.config, work.paths, work.order.role, clock)


def _check_init(work: Work) -> None:
    data = work.paths.k3s_data
    origin, asked = read_marker(data), asked_for(work)
    check_may_start(work)
    if datastore(data) is Datastore.AGENT:
        raise HopelessError(f"{data} has the data of an agent of another cluster; move it aside")
    # What an earlier identity began was there before this one, and is adopted as anybody's is.
    if origin is not None and origin.is_by(work.order.node) and origin != asked:
        raise HopelessError(
            f"{data} was made for {origin.describe()}, this is {asked.describe()}; move it aside"
        )


def _check_join(work: Work) -> None:
    """Data of this very cluster may stay, or change its role; any other is not touched."""
    data, asked = work.paths.k3s_data, work.order.ca_hash
    store = datastore(data)
    if store is Datastore.SQLITE:
        raise HopelessError(
            f"{data} has a single-node cluster of its own (SQLite); move it aside to join the site"
        )
    if store is Datastore.NONE:
        if "foreign" not in work.config.ignore_preflight:
            check_foreign(work.config, work.paths)
        return
    found = ca_hash(data)
    if found is not None and asked is not None and found != asked:
        kind = "a server" if store is Datastore.ETCD else "an agent"
        raise HopelessError(
            f"{data} has the data of {kind} of another cluster (CA {found[:12]}, the site's is "
            f"{asked[:12]}); move it aside to join the site"
        )
    if change_role.is_change(work):
        change_role.check(work)
