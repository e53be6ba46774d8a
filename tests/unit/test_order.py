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
from k3sagentd.k3s.flags import shared
from k3sagentd.k3s.order import ORDER_LIMIT_BYTES, check, check_url, take_order, write_order
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
        {"ca_hash": "a" * 64 + "\n"},
        {"node_name": "node1\n"},
        {"k3s_version": "latest; reboot"},
        {"k3s_version": "v1.33.4+k3s1\n"},
        {"k3s_version": "--write-kubeconfig-mode=666"},
        {"k3s_version": "v1.33.4-../../x+k3s1"},
        {"k3s_version": "v\u0661.33.4+k3s1"},
        {"k3s_version": "v1.33.4-" + "a" * 99 + "+k3s1"},
        {"shared_flags": {"kubelet-arg": "x"}},
        {"shared_flags": {"disable": "a\nb"}},
        {"shared_flags": {"disable": "--datastore-endpoint=x"}},
        {"shared_flags": {"disable": '["traefik", "-x"]'}},
        {"shared_flags": {"disable": '["traefik\\nserver: x"]'}},
        {"shared_flags": {"disable": "[not json"}},
        {"shared_flags": {"disable": "[" * 1000}},
        {"shared_flags": {"disable": "[" * 500 + "]" * 500}},
        {"shared_flags": {"disable": '[{"a": "b"}]'}},
        {"shared_flags": {"disable": "[1]"}},
        {"shared_flags": {"disable": "[null, NaN]"}},
        {"shared_flags": {"disable": '["é"]'}},
        {"epoch": -1},
        {"epoch": 10**6},
        {"generation": -1},
        {"attempt": -1},
        {"attempt": 10**6},
        {"instance": "../x"},
        {"instance": "a\n"},
        {"node": "a\n"},
        {"hardware": "a" * 16 + "\n"},
    ],
)
def test_bad_fields_are_refused_and_the_order_is_gone(paths: Paths, change: dict) -> None:
    write_order(paths, replace(JOIN, **change))
    with pytest.raises(DataError):
        take_order(paths)
    assert not paths.order.exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://-a:1",
        "https://a-:1",
        "https://a..b:1",
        "https://.a:1",
        "https://a.:1",
        "https://a_b:1",
        f"https://{'a' * 64}:1",
        f"https://{'.'.join(['a' * 63] * 4)}:1",
        "https://a:0",
        "https://a:01",
        "https://a:65536",
        "https://a:99999999999",
        "https://a:\u0661",
        "https://a:",
        "https://a:-1",
        "https://a:1?",
        "https://a:1?x",
        "https://a:1#",
        "https://a:1#x",
        "https://a:1/",
        "https://a:1\\x",
        "https://a@b:1",
        "https://a:b@c:1",
        "https://a:1 -o",
        "https://a:1\n",
        "\nhttps://a:1",
        "HTTPS://a:1",
        "https:a:1",
        "file:///etc/shadow",
        "https://é:1",
        "https://a%41:1",
        "https://[]:1",
        "https://[::1:1",
        "https://[12345::]:1",
        "https://[::1.2.3]:1",
        "https://[fe80::1%eth0]:1",
        "https://::1:1",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(DataError, match="server is"):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://10.0.0.1:6443",
        "https://[fd00::1]:1",
        "https://k3s.example.net:65535",
        "https://a-b:6443",
        f"https://{'.'.join(['a' * 63] * 3)}.{'a' * 61}:65535",
    ],
)
def test_what_is_an_address_of_a_server_is_taken(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize("value", [True, False, [], ["a"], ["a", "b-c"], "vxlan", "10.43.0.10", 24])
def test_whatever_an_operator_may_set_is_taken(value: object) -> None:
    check(replace(JOIN, shared_flags=shared({"disable": value})))


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
        {"shared_flags": []},
        {"attempt": 1.5},
        {"attempt": 10**400},
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


def swap_for_a_link(taken: Path, target: Path) -> None:
    taken.unlink()
    taken.symlink_to(target)


def swap_for_another_name_of_it(taken: Path, target: Path) -> None:
    taken.unlink()
    os.link(target, taken)


def swap_for_nothing(taken: Path, target: Path) -> None:
    taken.unlink()


@pytest.mark.parametrize("swap", [swap_for_a_link, swap_for_another_name_of_it, swap_for_nothing])
def test_the_file_is_swapped_between_taking_and_opening_it(
    paths: Paths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path, Path], None],
) -> None:
    """The directory is the daemon's own."""
    target = tmp_path / "secret"
    write_order(paths, JOIN)
    paths.order.rename(target)
    before = target.read_bytes()
    write_order(paths, JOIN)
    real = os.open

    def open_late(path: Path, *rest: int) -> int:
        monkeypatch.undo()
        swap(path, target)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(DataError, match="no plain file"):
        take_order(paths)
    assert target.read_bytes() == before
    assert list(paths.run.iterdir()) == []


def test_the_file_grows_while_it_is_read(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    write_order(paths, JOIN)
    real = os.read
    asked = []

    def read_late(fd: int, count: int) -> bytes:
        taken = next(paths.run.iterdir())
        with taken.open("ab") as file:
            file.write(b" " * ORDER_LIMIT_BYTES * 4)
        asked.append(count)
        return real(fd, count)

    monkeypatch.setattr(os, "read", read_late)
    with pytest.raises(DataError, match="more than 16384 bytes"):
        take_order(paths)
    assert asked == [ORDER_LIMIT_BYTES + 1]
    assert list(paths.run.iterdir()) == []
