# SPDX-License-Identifier: Apache-2.0
"""The few kinds of things that go wrong, each with its sysexits code.

Only ``main()`` turns them into an exit; everything below raises. A message says what failed,
what was found, what is allowed, and what to do.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent


class K3sagentdError(Exception):
    """Base of every error that is shown to the operator as one line."""

    exit_code: int = os.EX_SOFTWARE


class UsageError(K3sagentdError):
    """The command line asks for something that does not exist or may not be (EX_USAGE)."""

    exit_code = os.EX_USAGE


class ConfigError(K3sagentdError):
    """The configuration is wrong: file, key, found, allowed (EX_CONFIG).

    It may have several mistakes, which are ``args``; as a text it is the first, and how many more.
    """

    exit_code = os.EX_CONFIG

    def __str__(self) -> str:
        first, *more = self.args
        return f"{first} (and {len(more)} more: k3sagentd config check)" if more else str(first)


class MachineError(K3sagentdError):
    """This machine cannot do what is needed: disk, network, missing program (EX_OSERR)."""

    exit_code = os.EX_OSERR


class HopelessError(MachineError):
    """What no second attempt mends: a person is needed, or another machine."""


class UnavailableError(K3sagentdError):
    """Something that should answer does not: the daemon, a node of the lab (EX_UNAVAILABLE)."""

    exit_code = os.EX_UNAVAILABLE


class TimedOutError(K3sagentdError):
    """What was waited for did not happen in time; trying again may help (EX_TEMPFAIL)."""

    exit_code = os.EX_TEMPFAIL


class BusyError(K3sagentdError):
    """Another run of a command is in the way; trying again after it helps (EX_TEMPFAIL)."""

    exit_code = os.EX_TEMPFAIL


class TokenForgottenError(K3sagentdError):
    """Not a failure: the daemon must begin anew without the token (EX_TEMPFAIL)."""

    exit_code = os.EX_TEMPFAIL


class PermissionDeniedError(K3sagentdError):
    """The caller lacks the rights for this, mostly: is not root (EX_NOPERM)."""

    exit_code = os.EX_NOPERM


class DataError(K3sagentdError):
    """Bytes that came from outside (a file, a peer) are not what they must be (EX_DATAERR)."""

    exit_code = os.EX_DATAERR


class PeerError(DataError):
    """A peer sent something that no correct peer of our version sends."""


def fault(error: Exception) -> str:
    """A fault of ours as a reason: what and where. Not its text, which may hold anything, a token
    too; that is for the journal."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    where = f" in {Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}" if ours else ""
    return (
        f"a fault of k3sagentd's own: {type(error).__name__}{where}; please report it with what "
        "the journal says (journalctl -u k3sagentd-apply)"
    )
