# SPDX-License-Identifier: Apache-2.0
"""The units that run K3s on this machine, by whatever name its install script was given.

The script makes ``k3s.service`` and ``k3s-agent.service``, and with INSTALL_K3S_NAME
``k3s-<name>.service`` (K3S.md 6). Ours have the first two names; who was here before us may have
any. Only files are read: what systemd has loaded follows from them.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.files import read_bounded
from k3sagentd.paths import Paths

DIRECTORIES = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
STANDARD = {ServerOrAgent.SERVER: "k3s.service", ServerOrAgent.AGENT: "k3s-agent.service"}
PATTERNS = ("k3s.service", "k3s-*.service")
PROGRAMS = ("usr/local/bin", "opt/bin")
"""Where the script puts K3s and its own scripts; the second where the first cannot be written."""
FILE_LIMIT_BYTES = 256 * 1024


def named(paths: Paths) -> list[Path]:
    """Every unit with a name of K3s's, whatever it runs; the server's standard one first."""
    return [
        unit
        for directory in DIRECTORIES
        for pattern in PATTERNS
        for unit in sorted((paths.root / directory).glob(pattern))
    ]


def find(paths: Paths) -> dict[str, ServerOrAgent]:
    """Each unit that runs K3s, and as what: the standard names, and what runs ``k3s server`` or
    ``k3s agent`` by another name. A ``k3s-backup.service`` of somebody's is none."""
    found = {}
    for role, name in STANDARD.items():
        if any(unit.name == name for unit in named(paths)):
            found[name] = role
    for unit in named(paths):
        words = command(paths, unit.name)[:2]
        if unit.name not in found and len(words) == 2 and Path(words[0]).name == "k3s":
            with contextlib.suppress(ValueError):
                found[unit.name] = ServerOrAgent(words[1])
    return found


def name_of(paths: Paths, role: ServerOrAgent) -> str:
    """The unit that runs K3s in ``role``; the standard one where there is that, or none."""
    found = find(paths)
    if STANDARD[role] in found:
        return STANDARD[role]
    return next((name for name, each in found.items() if each is role), STANDARD[role])


def command(paths: Paths, name: str) -> list[str]:
    """The words of the unit's command line, empty where there is none."""
    for directory in DIRECTORIES:
        with contextlib.suppress(OSError, ValueError):
            data = read_bounded(paths.root / directory / name, FILE_LIMIT_BYTES)
            text = re.sub(r"\\\n", " ", data.decode(errors="replace"))
            lines = [line for line in text.splitlines() if line.startswith("ExecStart=")]
            # systemd.service(5): what may stand before the program.
            words = lines[-1].partition("=")[2].lstrip("@-:+!") if lines else ""
            return shlex.split(words)
    return []


def programs(paths: Paths, pattern: str) -> list[Path]:
    """The install script's own programs whose name matches, as far as they are there."""
    return [
        program
        for directory in PROGRAMS
        for program in sorted((paths.root / directory).glob(pattern))
    ]
