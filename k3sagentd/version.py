# SPDX-License-Identifier: Apache-2.0
"""Version and date, which stand in one place: the newest entry of ``debian/changelog``."""

from __future__ import annotations

import email.utils
import re
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "debian/changelog"
BUILT = Path(__file__).with_name("built")
"""In the package: the date as seconds since 1970. A file's own time may say anything: some
images set all of them to 0."""


def from_changelog() -> str:
    """The version of this checkout; for the build as well. Raises OSError outside of one."""
    with CHANGELOG.open() as file:
        match = re.match(r"k3sagentd \((\d+(?:\.\d+)*)[^)]*\)", file.readline())
    if match is None:
        raise ValueError(f"{CHANGELOG}: its first line names no version")
    return match[1]


def version() -> str:
    """The version of what runs: as it was installed, else of the checkout."""
    try:
        return from_changelog()
    except OSError:
        from importlib.metadata import version as installed

        return installed("k3sagentd")


def built_s() -> float:
    """When what runs was made, in seconds since 1970. Raises OSError, ValueError where unknown."""
    if not CHANGELOG.exists():
        return float(BUILT.read_text())
    match = re.search(r"^ -- .*>  (.+)$", CHANGELOG.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{CHANGELOG}: its newest entry has no date")
    return email.utils.parsedate_to_datetime(match[1]).timestamp()
