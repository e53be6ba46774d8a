# SPDX-License-Identifier: Apache-2.0
"""The token: made, read and judged. Who has it belongs to the site."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import secrets
import stat
import string
from dataclasses import dataclass
from pathlib import Path

from k3sagentd.errors import ConfigError
from k3sagentd.files import write_new

ENTROPY_MINIMUM_BITS = 128
SIZE_LIMIT_BYTES = 4096
TOKEN_BYTES = 32
NOVEL_SHARE = 0.4
"""A token that runs or repeats in more than the rest was not drawn at random: of 32 random hex
digits 18 % are neighbours on average, and 60 % in less than one case of ten million."""
KUBEADM = re.compile(r"[a-z0-9]{6}\.[a-z0-9]{16}")
"""K3s refuses this form as a server token (K3s, pkg/clientaccess/token.go)."""
CREATE_HINT = "make one with: k3sagentd token create"
NO_CREDENTIAL = b"none"
"""What the unit passes for a file that is not there (``SetCredential=``, systemd.exec(5))."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token that this machine shows, and those that it takes beside it in a rotation."""

    shown: bytes
    next: bytes | None = None
    previous: bytes | None = None

    @property
    def accepted(self) -> tuple[bytes, ...]:
        """The one that is shown, then the others; each once."""
        others = (each for each in (self.next, self.previous) if each is not None)
        return tuple(dict.fromkeys((self.shown, *others)))

    @property
    def newest_first(self) -> tuple[bytes, ...]:
        """In the order in which a site went from one to the other, the last first."""
        every = (self.next, self.shown, self.previous)
        return tuple(dict.fromkeys(each for each in every if each is not None))


def next_path(token_file: Path) -> Path:
    """The token that the site is going to."""
    return token_file.with_name(f"{token_file.name}.next")


def previous_path(token_file: Path) -> Path:
    """The token that the site comes from."""
    return token_file.with_name(f"{token_file.name}.previous")


def files(token_file: Path) -> tuple[Path, ...]:
    """Every file that may have a token; the one that is shown is the last."""
    return next_path(token_file), previous_path(token_file), token_file


def generate() -> str:
    """A fresh token of 256 bits in hex."""
    return secrets.token_hex(TOKEN_BYTES)


def create(path: Path) -> None:
    """Write a fresh token to ``path``, readable by its owner alone; never overwrites.

    Whole or not at all: half a token would keep the daemon off. Raises ConfigError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, f"{generate()}\n".encode())
    except FileExistsError:
        raise ConfigError(
            f"{path}: a token is here already; every machine of the site must have the same one, "
            "so it is not overwritten"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def load(path: Path) -> bytes:
    """Read and judge the token of ``token-file``; raises ConfigError.

    A credential named ``token`` that systemd passes (``LoadCredential=``, systemd.exec(5)) goes
    before the file: then only root ever read the file.
    """
    found = _credential("token", path)
    if found is None or found == NO_CREDENTIAL:
        found = _read(path, private=True)
    return judge(path, found)


def load_all(path: Path) -> Tokens:
    """The token of ``token-file`` and those beside it, judged alike; raises ConfigError."""
    return Tokens(
        load(path),
        next=_beside(next_path(path), "token.next"),
        previous=_beside(previous_path(path), "token.previous"),
    )


def load_unless_forgotten(path: Path, note: Path) -> Tokens | None:
    """As ``load_all``; None where root wiped it and left its ``note`` (``forget-token``)."""
    if note.exists() and not path.exists():
        return None
    return load_all(path)


def _beside(path: Path, credential: str) -> bytes | None:
    found = _credential(credential, path)
    if found is None and path.exists():
        found = _read(path, private=True)
    return None if found is None or found == NO_CREDENTIAL else judge(path, found)


def _credential(name: str, path: Path) -> bytes | None:
    """What systemd passes of the file ``path``; None where it passes nothing."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None or not Path(directory, name).exists():
        return None
    data = _read(Path(directory, name))
    with contextlib.suppress(OSError):  # the daemon may see the file's mode, if not more
        _check_mode(path, path.stat().st_mode)
    return data


def _read(path: Path, *, private: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(SIZE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: token-file: no such file; {CREATE_HINT}") from None
    except OSError as error:
        raise ConfigError(f"{path}: token-file: cannot be read: {error.strerror}") from error
    if private:
        _check_mode(path, status.st_mode)
    if len(data) > SIZE_LIMIT_BYTES:
        raise ConfigError(f"{path}: token-file: more than {SIZE_LIMIT_BYTES} bytes")
    return data.strip()


def _check_mode(path: Path, found: int) -> None:
    mode = stat.S_IMODE(found)
    if mode & 0o077:
        raise ConfigError(
            f"{path}: token-file: mode is {mode:04o}, others can read it; allowed: 0600 (chmod "
            f"600 {path})"
        )


def judge(path: Path, token: bytes) -> bytes:
    """Return ``token`` if it can carry a site; raises ConfigError, never showing it."""
    if not token:
        raise ConfigError(f"{path}: token-file: the token is empty; {CREATE_HINT}")
    flaw = _flaw(token)
    if flaw:
        raise ConfigError(f"{path}: token-file: {flaw}; {CREATE_HINT}")
    bits = entropy_bits(token.decode())
    if bits < ENTROPY_MINIMUM_BITS:
        raise ConfigError(
            f"{path}: token-file: the token has at most {bits:.0f} bits of entropy; allowed: at "
            f"least {ENTROPY_MINIMUM_BITS}; {CREATE_HINT}"
        )
    return token


def _flaw(token: bytes) -> str | None:
    if any(byte <= 0x20 or byte >= 0x7F for byte in token):
        return "the token has spaces, line breaks or characters beyond ASCII"
    text = token.decode("ascii")
    if KUBEADM.fullmatch(text):
        return "the token has kubeadm's form, which K3s does not take as server token"
    if text.startswith("K10") or ":" in text:
        return "the token is in K3s's secure form or has a colon; give the plain password"
    return None


def entropy_bits(token: str) -> float:
    """An estimate of the token's entropy, meant to pass every random token of 128 bits.

    Its length times the bits of the alphabet that it draws from, less what repeats itself or
    runs along the alphabet (``aaaa``, ``abcabc``, ``0123``). Words that a person strung together
    are made of lower-case letters alone: their letters count for half (C. E. Shannon,
    "Prediction and Entropy of Printed English", 1951, gives even less).
    """
    bits = len(token) * math.log2(_alphabet(token))
    if not any(char.isupper() or char.isdigit() for char in token):
        bits /= 2
    novel = 1.0 - max(_share_of_runs(token), _share_of_repeats(token))
    if novel >= NOVEL_SHARE:
        return bits
    return bits * novel


def _alphabet(token: str) -> int:
    if all(char in "0123456789abcdef" for char in token) or all(
        char in "0123456789ABCDEF" for char in token
    ):
        return 16
    if any(char.isupper() for char in token) and any(char.islower() for char in token):
        return 64  # base64, whether or not a digit or a sign happened to be drawn
    letters = len(string.ascii_lowercase) if any(char.isalpha() for char in token) else 0
    digits = len(string.digits) if any(char.isdigit() for char in token) else 0
    return letters + digits + (2 if any(not char.isalnum() for char in token) else 0)


def _share_of_runs(token: str) -> float:
    """The share of letters that are the one before, the next or the previous of it."""
    pairs = itertools.pairwise(token)
    return sum(abs(ord(a) - ord(b)) <= 1 for a, b in pairs) / len(token)


def _share_of_repeats(token: str) -> float:
    """The share of pieces of four letters that stood in the token before."""
    pieces = [token[i : i + 4] for i in range(max(1, len(token) - 3))]
    return 1 - len(set(pieces)) / len(pieces)
