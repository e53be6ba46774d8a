# SPDX-License-Identifier: Apache-2.0
"""Root reads an order as if an attacker had written it."""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.k3s import Action, Order, ServerOrAgent
from k3sagentd.errors import DataError
from k3sagentd.k3s.order import take_order, write_order
from k3sagentd.paths import Paths

JOIN = Order(
    action=Action.JOIN,
    epoch=0,
    role=ServerOrAgent.AGENT,
    node_name="node1",
    servers=("https://10.0.0.1:6443", "https://[fd00::1]:6443"),
    ca_hash="a" * 64,
    k3s_version="v1.33.4+k3s1",
    shared_flags={"disable": '["servicelb","traefik"]'},
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    found.run.mkdir(parents=True)
    found.root_run.mkdir(parents=True)
    return found


def test_an_order_is_taken_once(paths: Paths) -> None:
    write_order(paths, JOIN)
    assert take_order(paths) == JOIN
    assert take_order(paths) is None


@pytest.mark.parametrize(
    "change",
    [
        {"node_name": "a b"},
        {"node_name": "-a"},
        {"node_name": "a" * 64},
        {"node_name": "$(reboot)"},
        {"servers": ("http://10.0.0.1:6443",)},
        {"servers": ("https://10.0.0.1",)},
        {"servers": ("https://10.0.0.1:6443/x",)},
        {"servers": ("https://u:p@10.0.0.1:6443",)},
        {"servers": ("https://10.0.0.1:6443\nserver: x",)},
        {"servers": ("https://a:1",) * 17},
        {"servers": ()},
        {"ca_hash": None},
        {"ca_hash": "A" * 64},
        {"k3s_version": "latest; reboot"},
        {"shared_flags": {"kubelet-arg": "x"}},
        {"shared_flags": {"disable": "a\nb"}},
        {"epoch": -1},
        {"instance": "../x"},
    ],
)
def test_bad_fields_are_refused_and_the_order_is_gone(paths: Paths, change: dict) -> None:
    write_order(paths, replace(JOIN, **change))
    with pytest.raises(DataError):
        take_order(paths)
    assert not paths.order.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"command": "reboot"},
        {"epoch": "0"},
        {"epoch": True},
        {"servers": "https://10.0.0.1:6443"},
        {"servers": [1]},
        {"action": "exec"},
        {"role": None},
        {"shared_flags": {"disable": ["a"]}},
        {"node_name": {"a": 1}},
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(paths: Paths, change: dict) -> None:
    write_order(paths, JOIN)
    paths.order.write_text(json.dumps(json.loads(paths.order.read_text()) | change))
    with pytest.raises(DataError):
        take_order(paths)
    assert not paths.order.exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"action": "init"}', b"x" * 20000])
def test_bytes_that_are_no_order(paths: Paths, data: bytes) -> None:
    paths.order.write_bytes(data)
    with pytest.raises(DataError):
        take_order(paths)
    assert not paths.order.exists()


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def second_name(path: Path, target: Path) -> None:
    os.link(target, path)


def directory(path: Path, target: Path) -> None:
    path.mkdir()
    (path / "full").touch()


def pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


def listening(path: Path, target: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(path.parent):
        one.bind(path.name)


@pytest.mark.parametrize("make", [link, second_name, directory, pipe, listening])
def test_what_is_no_plain_file_is_refused_and_gone(
    paths: Paths, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    target = tmp_path / "secret"
    target.write_text("{}")
    make(paths.order, target)
    with pytest.raises(DataError, match="no plain file"):
        take_order(paths)
    assert target.read_text() == "{}"
    assert not os.path.lexists(paths.order)
    assert take_order(paths) is None  # the path unit is not started again and again


def test_an_order_that_comes_while_another_is_taken_is_not_lost(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_order(paths, JOIN)
    newer = replace(JOIN, attempt=1)
    real = os.open

    def open_late(path: Path, *rest: int) -> int:
        monkeypatch.undo()
        write_order(paths, newer)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", open_late)
    assert take_order(paths) == JOIN
    assert take_order(paths) == newer
    assert take_order(paths) is None
