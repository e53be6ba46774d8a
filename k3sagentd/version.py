# SPDX-License-Identifier: Apache-2.0
"""The version, which stands in one place: the first line of ``debian/changelog``."""

from __future__ import annotations

import re
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "debian/changelog"


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
