# SPDX-License-Identifier: Apache-2.0
"""The daemon's own socket: why it does not answer."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from k3sagentd.control import ControlClient
from k3sagentd.errors import PermissionDeniedError, UnavailableError

NOBODY = 65534


def ask(path: Path) -> None:
    asyncio.run(ControlClient(path).status())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the daemon listens; its directory is its own."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run/control.sock"


def test_who_may_not_ask_is_told_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.parent.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(NOBODY)
            with pytest.raises(
                PermissionDeniedError, match=r"control.sock: permission denied"
            ) as e:
                ask(path)
        finally:
            os.seteuid(user)
            path.parent.chmod(0o700)
    assert e.value.exit_code == 77
    assert "group k3sagentd" in str(e.value)


def test_where_nobody_listens_the_daemon_does_not_answer(path: Path) -> None:
    with pytest.raises(UnavailableError, match="the daemon does not answer"):
        ask(path)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    with pytest.raises(UnavailableError, match="the daemon does not answer"):
        ask(path)
