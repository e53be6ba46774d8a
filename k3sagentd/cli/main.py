# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments, commands, exit codes. The only place that exits."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from k3sagentd.errors import (
    ConfigError,
    K3sagentdError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from k3sagentd.paths import Paths

DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)?")
GOALS = ("nominated", "sealed", "joined", "complete")
GOALS_HELP = (
    "nominated: it is chosen which machine starts the cluster; sealed: the cluster exists; joined: "
    "this machine is ready in it; complete: as many machines as nodes says are ready in it"
)


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that one place decides on the code."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Looks the version up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from k3sagentd.version import version

        print(f"k3sagentd {version()}")
        parser.exit()


def _duration(text: str) -> float:
    match = DURATION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 30s, 10m, 1h")
    return float(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2] or "s"]


def parser(*, with_lab: bool = True) -> argparse.ArgumentParser:
    """All commands; the lab's own only where they are asked for, the daemon does not need them."""
    top = _Parser(
        prog="k3sagentd", description="Starts one highly available K3s cluster from equal machines."
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> _Parser:
        command: _Parser = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("run", "run the daemon (k3sagentd.service)", _run)
    add("apply", "carry out the order that is there, as root (k3sagentd-apply.service)", _apply)
    add("facts", "look at this machine, as root, and write it down for the daemon", _facts)
    add("provision", "take configuration and token from credentials or boot partition", _provision)
    status = add("status", "show the site as this node sees it", _status)
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--watch", action="store_true", help="show every change until Ctrl-C")
    wait = add("wait", "wait for the site to come that far; exit 75 when it does not", _wait)
    wait.add_argument("--for", dest="goal", choices=GOALS, required=True, help=GOALS_HELP)
    wait.add_argument(
        "--timeout", type=_duration, default=600.0, metavar="10m", help="default: 10m"
    )
    registration = add("registration", "show where a machine joins", _registration)
    registration.add_argument("--json", action="store_true", help="for programs")
    token = commands.add_parser("token", help="the site's token").add_subparsers(
        dest="token_command", required=True, metavar="COMMAND"
    )
    create = token.add_parser("create", help="write a new token; never overwrites one")
    create.add_argument("--file", type=Path, help="default: /etc/k3sagentd/token")
    create.add_argument(
        "--next", action="store_true", help="write token.next, which the site is to change to"
    )
    create.set_defaults(run=_token_create)
    rotate = token.add_parser(
        "rotate", help="go over to token.next here; the old token is still taken"
    )
    rotate.set_defaults(run=_token_rotate)
    forget = token.add_parser(
        "forget", help="take the old token no more; its file is overwritten and removed"
    )
    forget.set_defaults(run=_token_forget)
    config = commands.add_parser("config", help="the configuration").add_subparsers(
        dest="config_command", required=True, metavar="COMMAND"
    )
    check = config.add_parser("check", help="read it as the daemon does, and say what is wrong")
    check.set_defaults(run=_config_check)
    force = add("cluster-init", "start the cluster here: you decide instead of a quorum", _force)
    force.add_argument("--force", action="store_true", required=True)
    leave = add("leave", "take this machine out of its cluster, which goes on", _leave)
    repair = add("repair-addresses", "get a server whose address changed back into etcd", _repair)
    reset = add(
        "reset",
        "delete K3s, its data and this machine's identity; configuration and token stay",
        _reset,
    )
    for command in (force, leave, repair, reset):
        command.add_argument("--yes", action="store_true", help="do not ask")
    if with_lab:
        _add_lab(commands)
    return top


def _add_lab(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser("lab", help="a site of several machines on this one")
    try:
        from k3sagentd.lab import cli as lab
    except ModuleNotFoundError as error:
        if error.name != "k3sagentd.lab":
            raise
        command.set_defaults(run=_no_lab)
        command.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        return
    lab.add_arguments(command)
    command.set_defaults(run=lab.main)


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    try:
        light = arguments[:1] in (["run"], ["apply"], ["facts"], ["provision"])
        parsed = parser(with_lab=not light).parse_args(arguments)
        code: int = parsed.run(parsed)
        return code
    except K3sagentdError as error:
        print(f"k3sagentd: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"k3sagentd: {error.filename}: permission denied; run it as root", file=sys.stderr)
        return os.EX_NOPERM
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"k3sagentd: {where}{error.strerror or error}", file=sys.stderr)
        return os.EX_OSERR
    except KeyboardInterrupt:
        return 130


def console() -> NoReturn:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


# --- commands -------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    from k3sagentd import keys, site_token, systemd
    from k3sagentd.config import load_config

    systemd.set_up_logging()
    paths = Paths()
    if paths.left.exists():
        # As the unit's condition says it; where no unit asks, we do.
        logging.warning("%s", paths.left.read_text().strip())
        return 0
    config = load_config(paths)
    tokens = site_token.load_unless_forgotten(config.token_file, paths.token_forgotten)
    paths.run.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # scrypt is slow by design and leaves the interpreter free: load the rest meanwhile.
        accepted = tokens.accepted if tokens is not None else ()
        derived = [pool.submit(keys.derive, each) for each in accepted]
        from k3sagentd.daemon import run
    try:
        asyncio.run(run.main(config, tokens, tuple(each.result() for each in derived), paths))
    except ExceptionGroup as group:
        mine, rest = group.split(K3sagentdError)
        if rest is not None or mine is None:
            raise
        raise mine.exceptions[0] from group
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from k3sagentd import systemd
    from k3sagentd.k3s.apply import apply

    systemd.set_up_logging()
    _need_root("apply")
    return apply(Paths())


def _facts(arguments: argparse.Namespace) -> int:
    from k3sagentd.k3s.facts import write_facts

    logging.basicConfig(format="%(levelname)s %(message)s")
    _need_root("facts")
    write_facts(Paths())
    return 0


def _provision(arguments: argparse.Namespace) -> int:
    from k3sagentd import systemd
    from k3sagentd.provision import provision

    systemd.set_up_logging()
    _need_root("provision")
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    provision(Paths(), Path(directory) if directory else None)
    return 0


def _no_lab(arguments: argparse.Namespace) -> int:
    raise UnavailableError("the lab is in a package of its own: apt install k3sagentd-lab")


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise PermissionDeniedError(f"{what} must be run as root")


def _status(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import ask

    return asyncio.run(ask.status(Paths(), as_json=arguments.json, watch=arguments.watch))


def _wait(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import ask

    return asyncio.run(ask.wait(Paths(), arguments.goal, arguments.timeout))


def _registration(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import ask

    return asyncio.run(ask.registration(Paths(), as_json=arguments.json))


def _force(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import operate

    return operate.force(Paths(), yes=arguments.yes)


def _leave(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import operate

    _need_root("leave")
    return operate.leave(Paths(), yes=arguments.yes)


def _repair(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import operate

    _need_root("repair-addresses")
    return operate.repair_addresses(Paths(), yes=arguments.yes)


def _token_create(arguments: argparse.Namespace) -> int:
    from k3sagentd import rotation, site_token

    path = arguments.file or Paths().token
    if arguments.next:
        _need_root("token create --next")
        print(rotation.create_next(Paths(), path))
        return 0
    site_token.create(path)
    print(f"{path}: made; put the same file on every machine of the site")
    return 0


def _token_rotate(arguments: argparse.Namespace) -> int:
    from k3sagentd import rotation
    from k3sagentd.config import load_config

    _need_root("token rotate")
    print(rotation.rotate(Paths(), load_config(Paths()).token_file))
    return 0


def _token_forget(arguments: argparse.Namespace) -> int:
    from k3sagentd import rotation
    from k3sagentd.config import load_config

    _need_root("token forget")
    print(rotation.forget_previous(Paths(), load_config(Paths()).token_file))
    return 0


def _config_check(arguments: argparse.Namespace) -> int:
    from k3sagentd import site_token
    from k3sagentd.config import load_config

    paths = Paths()
    try:
        config = load_config(paths)
    except ConfigError as error:
        for mistake in error.args:
            print(mistake, file=sys.stderr)
        return error.exit_code
    site_token.load_unless_forgotten(config.token_file, paths.token_forgotten)
    print(
        f"{paths.config}: fine: {config.nodes} machines, {config.servers} servers, "
        f"role {config.role}, install by {config.install.method}"
    )
    return 0


def _reset(arguments: argparse.Namespace) -> int:
    from k3sagentd.cli import operate

    _need_root("reset")
    return operate.reset(Paths(), yes=arguments.yes)
