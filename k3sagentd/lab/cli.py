# SPDX-License-Identifier: Apache-2.0
"""``k3sagentd lab …``: a site of several machines on this one."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import Any

import yaml

from k3sagentd.cli.ask import rows, table, why_silent
from k3sagentd.control import ControlClient
from k3sagentd.errors import K3sagentdError, TimedOutError, UsageError
from k3sagentd.lab import network, site
from k3sagentd.lab.progress import STAGES, Progress
from k3sagentd.lab.site import Lab
from k3sagentd.paths import Paths

TIMEOUT_S = 600.0
LOOK_AROUND = """\
look around in another terminal:
  {program} lab status
  {program} lab exec node1 -- k3sagentd status
  {program} lab exec {server} -- k3s kubectl get nodes"""


def _program() -> str:
    """How this program is called, from a checkout or installed."""
    module = sys.argv[0].endswith("__main__.py")
    return f"{sys.executable} -m k3sagentd" if module else "k3sagentd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options and commands of ``lab``."""
    _add_up_options(parser)
    commands = parser.add_subparsers(dest="lab_command", metavar="COMMAND")
    up = commands.add_parser("up", help="make the machines and leave them running")
    _add_up_options(up)
    run = commands.add_parser("exec", help="run a command inside a machine")
    run.add_argument("node")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- CMD")
    add = commands.add_parser("add", help="one more machine")
    add.add_argument("--role", choices=("auto", "server", "agent"))
    for name, text in (("kill", "cut a machine's power"), ("start", "power it on again")):
        commands.add_parser(name, help=text).add_argument("node")
    partition = commands.add_parser("partition", help="cut the wire: node1,node2 / node3,node4")
    partition.add_argument("groups", nargs="+")
    commands.add_parser("heal", help="mend the wire")
    status = commands.add_parser("status", help="every machine's own view")
    status.add_argument("--json", action="store_true")
    commands.add_parser("down", help="take everything down")


def _add_up_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=5, help="machines (default 5)")
    parser.add_argument("--servers", type=int, help="default: 3, or 1 where nodes < 3")
    parser.add_argument("--k3s", metavar="PATH", help="a real K3s binary, not the stand-in")
    parser.add_argument("--k3s-arg", action="append", default=[], metavar="ARG")
    parser.add_argument("--wait", choices=STAGES, help="until the site is that far")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a line for every machine's configuration")  # fmt: skip
    parser.add_argument("--stand-in", action="append", default=[], metavar="KEY=VALUE",
                        help="a knob of the stand-in, e.g. promote_s=2")  # fmt: skip
    parser.add_argument("--same-hostname", metavar="NAME", help="the same on every machine")
    parser.add_argument("--unconfigured", action="store_true",
                        help="without token: the daemons wait for it")  # fmt: skip
    parser.add_argument("--partition", nargs="+", metavar="GROUP", help="cut from the start")


def main(arguments: argparse.Namespace) -> int:
    """Run one command of the lab."""
    match arguments.lab_command:
        case None:
            return _foreground(arguments)
        case "up":
            return _up(arguments)
        case "exec":
            return _exec(arguments)
        case "add":
            lab = site.load()
            name = lab.add(role=arguments.role)
            lab.start(name)
            print(f"{name} is on, at {network.address_of(lab.machines[name])}")
        case "kill":
            site.load().kill(arguments.node)
        case "start":
            site.load().start(arguments.node)
        case "partition":
            network.partition(_groups(site.load(), arguments.groups))
        case "heal":
            site.load()
            network.heal()
        case "status":
            return asyncio.run(_status(site.load(), as_json=arguments.json))
        case "down":
            site.down()
    return 0


def _pairs(texts: list[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is not KEY=VALUE")
        found[key] = yaml.safe_load(value)
    return found


def _groups(lab: Lab, texts: list[str]) -> list[list[str]]:
    groups = [
        [name for name in text.replace(",", " ").split() if name]
        for text in " ".join(texts).split("/")
    ]
    for name in [name for group in groups for name in group]:
        lab.machine(name)
    if len(groups) < 2:
        raise UsageError("a partition has two sides or more: node1,node2 / node3,node4,node5")
    return groups


def _make(arguments: argparse.Namespace, *, owned: bool) -> Lab:
    if not 1 <= arguments.nodes <= site.MACHINES_LIMIT:
        raise UsageError(f"--nodes is {arguments.nodes}; allowed: 1 to {site.MACHINES_LIMIT}")
    if arguments.k3s and not os.access(arguments.k3s, os.X_OK):
        raise UsageError(f"--k3s: {arguments.k3s} is not executable")
    lab = Lab(
        nodes=arguments.nodes,
        token="",
        servers=arguments.servers,
        k3s=os.path.abspath(arguments.k3s) if arguments.k3s else None,  # noqa: PTH100
        k3s_arguments=arguments.k3s_arg,
        settings=_pairs(arguments.set),
        knobs=_pairs(arguments.stand_in),
    )
    site.create(lab, owned=owned)
    for _ in range(arguments.nodes):
        if arguments.unconfigured:
            lab.add(hostname=arguments.same_hostname, token=None)
        else:
            lab.add(hostname=arguments.same_hostname)
    if arguments.partition:
        network.partition(_groups(lab, arguments.partition))
    for name in lab.machines:
        lab.start(name)
    return lab


def _say(as_json: bool) -> Any:
    stream = sys.stderr if as_json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


def _up(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.wait:
        # A program asked for one answer: it gets it, and nothing stays.
        return _foreground(arguments)
    lab = _make(arguments, owned=False)
    say = _say(arguments.json)
    if arguments.wait:
        return _wait(lab, arguments, say)
    say(f"{len(lab.machines)} machines are on; k3sagentd lab status shows them")
    return 0


def _wait(lab: Lab, arguments: argparse.Namespace, say: Any) -> int:
    progress = Progress(lab, say)
    stage = arguments.wait or "complete"
    ok = asyncio.run(progress.until(stage, arguments.timeout))
    view = next(iter(progress.views.values()), {})
    if arguments.json:
        answer = {"ok": ok, "timings_s": progress.timings_s, "site": view.get("site")}
        print(json.dumps(answer | {"nodes": view.get("nodes", [])}))
        return 0 if ok else os.EX_TEMPFAIL
    if not ok:
        waits = [
            f"{name}: {view['node']['waiting_for'] or 'nothing'}"
            for name, view in progress.views.items()
        ]
        raise TimedOutError(f"not {stage} after {arguments.timeout:.0f} s; " + "; ".join(waits))
    say("")
    say(table(view))
    say("")
    stages = ", ".join(f"{name} {at_s:.1f} s" for name, at_s in progress.timings_s.items())
    say(f"since the last machine's start: {stages}")
    return 0


def _foreground(arguments: argparse.Namespace) -> int:
    site.need_root()
    say = _say(arguments.json)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    interactive = not arguments.json and not arguments.wait
    try:
        lab = _make(arguments, owned=True)
        say(f"{len(lab.machines)} machines with one token; none of them is the first")
        code = _wait(lab, arguments, say)
        if interactive:
            server = _a_server(lab)
            say("\n" + LOOK_AROUND.format(program=_program(), server=server))
            if sys.stdin.isatty():
                say("\nCtrl-C takes everything down")
                signal.pause()
        return code
    except KeyboardInterrupt:
        say("")
        return 0 if interactive else 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        site.down()


def _a_server(lab: Lab) -> str:
    """The name of a machine that runs a server."""
    for name in lab.machines:
        if (lab.machine(name) / "var/lib/rancher/k3s/server").exists():
            return name
    return "node1"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _exec(arguments: argparse.Namespace) -> int:
    command = arguments.arguments
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise UsageError("lab exec NODE -- CMD…")
    if command[0] == "k3sagentd":
        command = [sys.executable, "-m", *command]
    lab = site.load()
    return subprocess.run(lab.command_in(arguments.node, command), check=False).returncode


async def views(lab: Lab) -> dict[str, dict[str, Any]]:
    """Every machine's own view; ``error`` says why there is none."""
    found: dict[str, dict[str, Any]] = {}
    for name in lab.machines:
        if lab.pid(name) is None:
            found[name] = {"error": "off"}
            continue
        try:
            found[name] = (await ControlClient(lab.control(name)).status())["status"]
        except K3sagentdError as error:
            found[name] = {"error": why_silent(Paths(lab.machine(name))) or str(error)}
    return found


async def _status(lab: Lab, *, as_json: bool) -> int:
    seen = await views(lab)
    if as_json:
        print(json.dumps(seen, indent=1))
        return 0
    for name, view in seen.items():
        if "error" in view:
            print(f"{name}: {view['error']}\n")
            continue
        found, node = view["site"], view["node"]
        wait = f"; waits for {node['waiting_for']}" if node["waiting_for"] else ""
        print(
            f"{name}: site {found['phase']}, {found['seen']} of {found['nodes']} here; "
            f"{node['role']}, {node['phase']}{wait}"
        )
        print("\n".join("  " + line for line in rows(view["nodes"], colour=sys.stdout.isatty())))
        print()
    return 0
