# SPDX-License-Identifier: Apache-2.0
"""Commands that ask the running daemon, and what they print."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from k3sagentd import site_token
from k3sagentd.config import load_config
from k3sagentd.control import ControlClient
from k3sagentd.core.words import duration
from k3sagentd.errors import ConfigError, TimedOutError, UnavailableError
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import files_of

WATCH_S = 60.0
RETRY_S = 0.5
REFUSED_SHOWN = 3
LACKING_SHOWN = 5
GREEN, YELLOW, RED, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"
COLOURS = {"ready": GREEN, "sealed": GREEN, "failed": RED, "conflict": RED}


def reached(goal: str, status: dict[str, Any]) -> bool:
    """Whether ``status`` is as far as ``goal`` (of ``wait --for``)."""
    site, node = status["site"], status["node"]
    sealed = site["phase"] == "sealed"
    if goal == "nominated":
        return bool(sealed or site["phase"] == "nominated")
    if goal == "sealed":
        return bool(sealed)
    if goal == "joined":
        return bool(sealed and node["phase"] == "ready")
    return bool(sealed and len(_ready(status["nodes"])) >= site["nodes"])


def _ready(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in nodes if row["phase"] == "ready" and row["age_s"] == 0]


async def status(paths: Paths, *, as_json: bool, watch: bool) -> int:
    """``k3sagentd status``."""
    client = ControlClient(paths.control)
    after = -1
    while True:
        try:
            answer = await client.status(after, WATCH_S if watch and after >= 0 else 0.0)
        except UnavailableError as error:
            raise UnavailableError(why_silent(paths) or str(error)) from error
        if answer["rev"] != after:
            after = answer["rev"]
            found = answer["status"]
            print(json.dumps(found, indent=None if watch else 2) if as_json else table(found))
            sys.stdout.flush()
        if not watch:
            return 0


def why_silent(paths: Paths) -> str | None:
    """Why the daemon was not even started, or ended at once; None where it has what it needs."""
    if paths.left.exists():
        return f"the daemon does not run: {paths.left.read_text().strip()}"
    missing = []
    if not files_of(paths.config):
        missing.append(f"{paths.config} (with at least nodes: N)")
    if not paths.token.exists() and not paths.token_forgotten.exists():
        missing.append(f"{paths.token} (k3sagentd token create, once; then copy it)")
    if missing:
        waits = " and ".join(missing)
        return f"unconfigured: the daemon waits for {waits}; it starts by itself then"
    try:
        token = load_config(paths).token_file
        if os.access(token, os.R_OK):
            site_token.load_all(token)
    except ConfigError as error:
        return f"the daemon does not run: {error}"
    return None


async def wait(paths: Paths, goal: str, timeout_s: float) -> int:
    """``k3sagentd wait``: 0, or TimedOutError; a conflict is not waited out, a silent daemon is."""
    client = ControlClient(paths.control)
    deadline = time.monotonic() + timeout_s
    after = -1
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        try:
            answer = await client.status(after, min(WATCH_S, left_s) if after >= 0 else 0.0)
        except UnavailableError as error:
            if left_s == 0:
                reason = why_silent(paths) or str(error)
                raise TimedOutError(f"not {goal} after {timeout_s:.0f} s; {reason}") from error
            await asyncio.sleep(min(RETRY_S, left_s))
            continue
        after, found = answer["rev"], answer["status"]
        if reached(goal, found):
            return 0
        if found["site"]["phase"] == "conflict":
            raise UnavailableError(f"conflict: {found['node']['waiting_for']}")
        if left_s == 0:
            raise TimedOutError(f"not {goal} after {timeout_s:.0f} s; {missing(found)}")


def missing(found: dict[str, Any]) -> str:
    """What ``wait`` waits for, in one line: where this machine waits for nothing, the others."""
    if found["node"]["waiting_for"]:
        return f"waiting for {found['node']['waiting_for']}"
    wanted, nodes = found["site"]["nodes"], _present(found["nodes"])
    ready = _ready(nodes)
    others = [
        f"{row['name']} ({row['phase'] if row['age_s'] == 0 else 'not heard'})"
        for row in nodes
        if row not in ready
    ]
    more = len(others) - LACKING_SHOWN
    named = [*others[:LACKING_SHOWN], *([f"{more} more"] if more > 0 else [])]
    unknown = wanted - len(nodes)
    if unknown > 0:
        named.append(f"{unknown} that this machine has not heard of")
    return f"{len(ready)} of {wanted} machines are ready here; not ready: {', '.join(named)}"


async def registration(paths: Paths, *, as_json: bool) -> int:
    """``k3sagentd registration``."""
    found = await ControlClient(paths.control).registration()
    found.pop("type", None)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for server in found["servers"]:
        print(server)
    print(f"CA hash: {found['ca_hash']}")
    return 0


def table(found: dict[str, Any], *, colour: bool | None = None) -> str:
    """The site in lines, as systemctl would show it."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ if colour is None else colour
    site, node, nodes = found["site"], found["node"], _present(found["nodes"])
    facts = [
        ("Site", f"{site['id']} ({site['phase']}, epoch {site['epoch']})"),
        ("Machines", _machines(site, nodes)),
        ("This node", f"{node['name']} ({node['id'][:8]}), {node['role']}, {node['phase']}"),
    ]
    if also := site.get("also"):
        facts.insert(1, ("Takes also", f"{' '.join(also)} (the token is being rotated)"))
    if site["registration"]:
        facts.append(("Register at", " ".join(site["registration"])))
    if node["waiting_for"]:
        facts.append(("Waiting for", node["waiting_for"]))
    facts += [("Note", note) for note in node["notes"]]
    refused = node.get("refused", [])[-REFUSED_SHOWN:]
    facts += [("Refuses", f"{each['address']}: {each['reason']}") for each in refused]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:>{width}}: {value}" for name, value in facts]
    return "\n".join([*lines, "", *rows(nodes, colour=colour)])


def _present(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a machine was before it got a new image: it is here as another node."""
    here = {(row["name"], row["address"]) for row in nodes if row["age_s"] == 0}
    return [row for row in nodes if row["age_s"] == 0 or (row["name"], row["address"]) not in here]


def _machines(site: dict[str, Any], nodes: list[dict[str, Any]]) -> str:
    """Who is here: before the seal counted against the quorum, after it against the servers."""
    if site["phase"] != "sealed":
        return f"{site['seen']} of {site['nodes']} here, {site['quorum']} must agree"
    silent = sum(row["age_s"] > 0 for row in nodes)
    listed = site["roster"]
    ready = [row for row in nodes if row["phase"] == "ready" and row["age_s"] == 0]
    servers = sum(row["id"] in listed for row in ready)
    here = f"{site['seen']} here, {silent} not heard" if silent else f"{site['seen']} here"
    return f"{here}; {servers} of {max(len(listed), site['servers'])} servers ready"


def rows(nodes: list[dict[str, Any]], *, colour: bool) -> list[str]:
    """One aligned line for each node."""
    head = ("NODE", "ADDRESS", "ROLE", "PHASE", "HEARD", "ID")
    body = [
        (
            row["name"],
            row["address"] or "-",
            row["role"],
            row["phase"],
            "now" if row["age_s"] == 0 else f"{duration(row['age_s'])} ago",
            row["id"][:8],
        )
        for row in nodes
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = []
    for line in (head, *body):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        if colour and line is not head:
            cells[3] = COLOURS.get(line[3], YELLOW) + cells[3] + PLAIN
        lines.append("  ".join(cells).rstrip())
    return lines
