# SPDX-License-Identifier: Apache-2.0
"""``k3sagentd reset``: a machine becomes as it was before its first start.

Configuration and token stay (/etc/k3sagentd), and so does /etc/rancher/node, by which K3s knows a
machine again. From the first step to the last the mark ``left`` keeps the daemon from running: half
a reset is no machine of any site.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from k3sagentd.config import Config
from k3sagentd.errors import ConfigError
from k3sagentd.files import fsync_directory
from k3sagentd.k3s import underway, units
from k3sagentd.k3s.data import has_content, put_aside
from k3sagentd.k3s.facts import write_facts
from k3sagentd.k3s.install import method, run
from k3sagentd.paths import Paths
from k3sagentd.upkeep import service

UNINSTALL_TIMEOUT_S = 900.0
ASIDE = "k3s.reset"
KEEPALIVED_HEADER = b"# Written by k3sagentd"

Say = Callable[[str], None]


def uninstall_scripts(paths: Paths) -> list[Path]:
    """K3s's own, of a server, of an agent, of what was given another name (K3S.md 6).

    While other units of K3s are there, each takes its own unit away; the last one K3s and its data.
    """
    patterns = ("k3s-uninstall.sh", "k3s-*-uninstall.sh")
    return [each for pattern in patterns for each in units.programs(paths, pattern)]


def is_needed(paths: Paths) -> bool:
    """Whether there is anything that a reset would change."""
    return (
        paths.left.exists()
        or bool(uninstall_scripts(paths))
        or any(any(each) for each in (_inside(paths.state), _inside(paths.root_state)))
        or has_content(paths.k3s_data)
        or paths.dropin.exists()
        or any(_tokens(paths))
    )


def question(paths: Paths, config: Config) -> str:
    """What will be lost, as people must read it before."""
    scripts = uninstall_scripts(paths)
    lines = ["This makes the machine as it was before its first start."]
    if scripts and not paths.installed.exists():
        lines.append("K3s was here before k3sagentd; it goes all the same.")
    if scripts:
        names = ", ".join(each.name for each in scripts)
        lines.append(f"K3s and its data on this machine are DELETED ({names}).")
    elif has_content(paths.k3s_data):
        lines.append(f"K3s stops here; its data is moved aside ({ASIDE}).")
    lines += [
        f"Identity and votes ({paths.state}) are deleted; {paths.config.parent} stays.",
        "A member of a cluster leaves it first (k3sagentd leave), or it stays there as a dead one.",
        "Before the site is sealed, reset all its machines or none: votes that are forgotten can",
        "make two clusters.",
    ]
    return "\n".join(lines)


def reset(paths: Paths, config: Config, say: Say) -> None:
    """Do what is left to do; raises MachineError."""
    service.mark(paths, "a reset is not finished; run k3sagentd reset again")
    for step in _steps(paths, config):
        say(step)
    service.unmark(paths)


def _steps(paths: Paths, config: Config) -> Iterator[str]:
    """Yield each step's name before it is done."""
    if service.has_systemd(paths, config):
        yield "stop the daemon"
        service.stop(paths, config)
    with underway.alone(paths):
        for path in (paths.order, paths.errand, paths.result, paths.errand_result):
            path.unlink(missing_ok=True)
        yield from _remove_k3s(paths, config)
        yield "remove what k3sagentd told K3s"
        for path in (paths.dropin, *_tokens(paths)):
            _remove(path)
        yield from _remove_keepalived(paths, config)
        yield "remove identity and votes"
        for directory in (paths.root_state, paths.state):
            for path in sorted(_inside(directory)):
                _remove(path)
    with contextlib.suppress(ConfigError, OSError):
        # Without systemd nobody looks anew before the daemon starts.
        write_facts(paths)


def _remove_k3s(paths: Paths, config: Config) -> Iterator[str]:
    yield "stop K3s"
    method(config, paths).stop()
    for script in uninstall_scripts(paths):
        yield f"run {script}"
        run([str(script)], timeout_s=UNINSTALL_TIMEOUT_S, what=script.name)
    if has_content(paths.k3s_data):
        yield f"move what is in {paths.k3s_data} aside"
        put_aside(paths.k3s_data, ASIDE)


def _remove_keepalived(paths: Paths, config: Config) -> Iterator[str]:
    try:
        ours = paths.keepalived.read_bytes().startswith(KEEPALIVED_HEADER)
    except OSError:
        return
    if ours:
        yield "give the virtual address up"
        if service.has_systemd(paths, config):
            service.systemctl("stop", "keepalived.service")
        _remove(paths.keepalived)


def _tokens(paths: Paths) -> list[Path]:
    """Copies of tokens beside K3s's configuration."""
    return sorted(paths.k3s_token.parent.glob("k3sagentd-*"))


def _inside(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if path.parent.is_dir():
        fsync_directory(path.parent)
