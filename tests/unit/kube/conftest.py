# SPDX-License-Identifier: Apache-2.0
"""A server of the cluster on a root directory, and the API that root asks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from k3sagentd.k3s import errand as errands
from k3sagentd.k3s.kube import Kube
from k3sagentd.paths import Paths
from tests.unit.fake_api import FakeApi


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    for each in (found.run, found.root_run, found.config.parent, tmp_path / "bin"):
        each.mkdir(parents=True)
    found.config.write_text(f"nodes: 3\ninstall: {{binary: {tmp_path}/bin/k3s}}\n")
    return found


@pytest.fixture
def api(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    made = FakeApi(tmp_path / "api")
    made.give_certificates(paths.k3s_data / "server/tls")
    monkeypatch.setattr(errands, "Kube", lambda paths: Kube(paths, made.url))
    yield made
    made.close()
