# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of an interface."""

from pathlib import Path

import pytest

from k3sagentd.discovery import addresses


@pytest.mark.parametrize(("file", "there"), [("1\n", True), ("0\n", False), (None, True)])
def test_a_carrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, there: bool
) -> None:
    monkeypatch.setattr(addresses, "INTERFACES", tmp_path)
    if file is not None:
        (tmp_path / "eth0").mkdir()
        (tmp_path / "eth0/carrier").write_text(file)
    assert addresses.has_carrier("eth0") is there


def test_an_interface_that_is_down_has_no_carrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "INTERFACES", tmp_path)
    (tmp_path / "eth0/carrier").mkdir(parents=True)  # EINVAL there, EISDIR here
    assert not addresses.has_carrier("eth0")


def test_the_kernels_own_loopback_has_one() -> None:
    assert addresses.has_carrier("lo")
