# SPDX-License-Identifier: Apache-2.0
"""Tests run side by side: each worker has labs and fleets of its own, which share no wire."""

import os

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    os.environ["K3SAGENTD_LAB_PREFIX"] = f"k3sl-{WORKER}-"
    os.environ["K3SAGENTD_LAB"] = f"/var/lib/k3sagentd-lab-{WORKER}"
    os.environ["K3SAGENTD_FLEET"] = f"/var/lib/k3sagentd-fleet-{WORKER}"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares machines stays together: the fleet's bases, and each lab file's sites."""
    for item in items:
        parts = item.path.parts
        group = "fleet" if "fleet" in parts else item.path.stem if "lab" in parts else None
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
