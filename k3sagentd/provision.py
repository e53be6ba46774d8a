# SPDX-License-Identifier: Apache-2.0
"""Zero touch: configuration and token from where a machine without a keyboard gets them.

In this order, each of the two for itself: what is in /etc/k3sagentd already; systemd's
credentials ``k3sagentd.config`` and ``k3sagentd.token`` (systemd.exec(5): from a hypervisor's
SMBIOS strings, the kernel's command line, a container manager); the boot partition. What is taken
is written to /etc/k3sagentd, whole and durably, before the token is wiped from the boot partition.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k3sagentd import site_token
from k3sagentd.config import load_config
from k3sagentd.errors import ConfigError
from k3sagentd.files import finish_wipe, read_bounded, wipe, wiping_path, write_atomically
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import files_of

log = logging.getLogger(__name__)

CONFIG_LIMIT_BYTES = 256 * 1024
NOTE = "k3sagentd-was-here.txt"
TOKEN, CONFIG = "token", "config.yaml"


@dataclass(frozen=True, slots=True)
class Source:
    """A place that may have something for us."""

    config: Path
    token: Path
    boot: bool = False


def provision(paths: Paths, credentials: Path | None) -> None:
    """Take what is missing from the first source that has it; what is bad there is said.

    A wipe that a power cut ended is finished first, there and here.
    """
    _finish_wipes(paths)
    for source in _sources(paths, credentials):
        notes = list(_take(paths, source))
        for note in notes:
            log.info("%s", note)
        if source.boot and notes:
            _leave_note(source.token.parent, notes)


def _finish_wipes(paths: Paths) -> None:
    cards = [directory / TOKEN for directory in paths.boot_partitions]
    for path in (*site_token.files(paths.token), *cards):
        try:
            if finish_wipe(path):
                log.info("%s was overwritten and removed", path)
        except OSError as error:
            log.warning("%s: %s", wiping_path(path), error.strerror)


def _sources(paths: Paths, credentials: Path | None) -> Iterator[Source]:
    if credentials is not None:
        yield Source(credentials / "k3sagentd.config", credentials / "k3sagentd.token")
    for directory in paths.boot_partitions:
        if directory.is_dir():
            yield Source(directory / CONFIG, directory / TOKEN, boot=True)


def _take(paths: Paths, source: Source) -> Iterator[str]:
    """Do it, yielding what was done and what was not."""
    if source.boot:
        yield from _misnamed(source.token.parent)
    try:
        data = _read(source.config, CONFIG_LIMIT_BYTES)
        if data is not None and not files_of(paths.config):
            _check_config(data, source.config)
            _write(paths.config, data, 0o644)
            yield f"{source.config} is {paths.config} now"
    except ConfigError as error:
        yield f"not taken: {error}"
    try:
        token = _read(source.token, site_token.SIZE_LIMIT_BYTES)
    except ConfigError as error:
        yield f"not taken: {error}"
        return
    if token is None:
        return
    if not paths.token.exists():
        if paths.token_forgotten.exists() and not source.boot:
            return  # it is given at every boot; on the boot partition somebody put it on purpose
        try:
            site_token.judge(source.token, token.strip())
        except ConfigError as error:
            yield f"not taken: {error}"
            return
        _write(paths.token, token.strip() + b"\n", 0o600)
        yield f"{source.token} is {paths.token} now"
    if not source.boot:
        return
    if paths.token.read_bytes().strip() != token.strip():
        yield f"{source.token} was not taken: {paths.token} has another one; remove either"
    elif _wipe(source.token):
        yield f"{source.token} was overwritten and removed: anybody with the card could read it"
    else:
        hidden = wiping_path(source.token)
        left = hidden if hidden.exists() else source.token
        yield f"{left} could not be removed; anybody with the card can read it: remove it"


def _misnamed(directory: Path) -> Iterator[str]:
    """What a person, or Windows with its hidden endings, meant for us and called otherwise."""
    for path in sorted(directory.iterdir()):
        for meant in (TOKEN, CONFIG):
            stem = meant.partition(".")[0]
            if path.name.lower().split(".")[0] == stem and path.name not in (TOKEN, CONFIG):
                yield f"{path} was not looked at: rename it to {meant}, or remove it"


def _read(path: Path, limit_bytes: int) -> bytes | None:
    """None where there is nothing; raises ConfigError."""
    try:
        return read_bounded(path, limit_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _check_config(data: bytes, source: Path) -> None:
    """Raise ConfigError, naming ``source``, unless the daemon would take it."""
    with tempfile.TemporaryDirectory() as directory:
        trial = Paths(Path(directory))
        trial.config.parent.mkdir(parents=True)
        trial.config.write_bytes(data)
        try:
            load_config(trial)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(trial.config), str(source))) from None


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_atomically(path, data, mode=mode)


def _wipe(path: Path) -> bool:
    """Overwrite and remove; whether that was done."""
    try:
        wipe(path)
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)
        return False
    return True


def _leave_note(directory: Path, notes: list[str]) -> None:
    note, text = directory / NOTE, "\r\n".join([*notes, ""]).encode()
    with contextlib.suppress(OSError):  # a note is not worth a failure
        if note.exists() and note.read_bytes() == text:
            return  # the same at every boot: a card wears out
        write_atomically(note, text, mode=0o755)
