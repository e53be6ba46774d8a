# SPDX-License-Identifier: Apache-2.0
"""What the daemon tells systemd (sd_notify(3)), and where its log goes."""

from __future__ import annotations

import hmac
import logging
import os
import sys
from pathlib import Path
from typing import Any

from systemd.journal import JournalHandler

from systemd import daemon


def notify(**fields: Any) -> None:
    """Send fields such as ``READY=1``; nothing happens outside a unit of Type=notify."""
    daemon.notify("\n".join(f"{key}={value}" for key, value in fields.items()))


def watchdog_s() -> float | None:
    """Half of the time in which systemd wants to hear of us (sd_watchdog_enabled(3))."""
    pid, usec = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or (pid is not None and pid != str(os.getpid())):
        return None
    return int(usec) / 2_000_000


def is_unit() -> bool:
    """Whether this very process was started by systemd (systemd.exec(5), $SYSTEMD_EXEC_PID)."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def machine_mark(site_id: str) -> str | None:
    """A mark of this machine's id that says nothing of the id itself, as machine-id(5) asks."""
    try:
        machine_id = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return None
    if len(machine_id) != 32:
        return None
    return hmac.new(machine_id.encode(), site_id.encode(), "sha256").hexdigest()[:16]


def _stderr_is_the_journal() -> bool:
    """As systemd.exec(5) says of $JOURNAL_STREAM."""
    try:
        device, inode = os.environ.get("JOURNAL_STREAM", "").split(":")
        status = os.fstat(sys.stderr.fileno())
        return (int(device), int(inode)) == (status.st_dev, status.st_ino)
    except (ValueError, OSError):
        return False


def set_up_logging(level: int = logging.INFO, **fields: str) -> None:
    """To the journal with structured fields where stderr is the journal, else plain lines."""
    handler: logging.Handler
    if _stderr_is_the_journal():
        handler = JournalHandler(SYSLOG_IDENTIFIER="k3sagentd", **fields)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
