# SPDX-License-Identifier: Apache-2.0
"""A server of a sealed site on a root directory, its daemon, and the API that it may ask."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from k3sagentd.k3s import install, spared
from k3sagentd.k3s.kube import Kube, RefusedError
from k3sagentd.paths import Paths
from k3sagentd.upkeep import repair, repair_steps
from tests.unit.fake_api import FakeApi
from tests.unit.machine import Daemon, Server


def refuses(paths: Paths) -> Kube:
    """K3s's API here, where nobody listens."""
    raise RefusedError("nobody listens")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path / "root")
    monkeypatch.setattr(install, "PATH", f"{made.paths.root}/bin:{install.PATH}")
    monkeypatch.setenv("PATH", install.PATH)
    monkeypatch.setattr(repair, "HEARSAY_S", 0.0)
    monkeypatch.setattr(repair_steps, "API_POLL_S", 0.01)
    monkeypatch.setattr(repair_steps, "STALE_S", 0.0)
    monkeypatch.setattr(spared, "Kube", refuses)
    return made


@pytest.fixture
def daemon(server: Server) -> Iterator[Daemon]:
    with Daemon(server) as made:
        yield made


@pytest.fixture
def api(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The only server that answers, whatever its address."""
    made = FakeApi(tmp_path / "api")
    made.give_certificates(server.paths.k3s_data / "server/tls")
    asked: list[str] = []
    made.urls = asked

    def client(paths: Paths, url: str = "local") -> Kube:
        asked.append(url)
        return Kube(paths, made.url)

    monkeypatch.setattr(repair, "Kube", client)
    monkeypatch.setattr(repair_steps, "Kube", client)
    monkeypatch.setattr(spared, "Kube", client)
    yield made
    made.close()
