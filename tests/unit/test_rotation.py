# SPDX-License-Identifier: Apache-2.0
"""A site's token is changed: each step, its refusals, and a kill at any instant of it."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from k3sagentd import files, rotation, site_token, store
from k3sagentd.core.log import Nominate, Seal
from k3sagentd.core.state import Durable
from k3sagentd.core.words import NodeId
from k3sagentd.errors import ConfigError, UsageError
from k3sagentd.hardware import Hardware
from k3sagentd.identity import load_or_create
from k3sagentd.keys import derive
from k3sagentd.paths import Paths
from k3sagentd.site_token import Tokens, load_all

OLD, NEW = (site_token.generate().encode() for _ in range(2))
KEYS = derive(OLD)


class Killed(BaseException):
    """The power went."""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    found.token.parent.mkdir(parents=True)
    put(found.token, OLD)
    seal(found)
    return found


def put(path: Path, token: bytes, mode: int = 0o600) -> None:
    path.write_bytes(token + b"\n")
    path.chmod(mode)


def seal(paths: Paths, *, sealed: bool = True) -> None:
    node = load_or_create(paths.state, KEYS, Hardware()).node
    log = (Nominate(init=node, servers=(node,)), Seal(ca_hash="a" * 64, addresses=("https://x",)))
    store.save(paths.state, Durable(node=NodeId(node), nodes=1, log=log if sealed else log[:1]))


def beside(paths: Paths) -> tuple[Path, Path]:
    return site_token.next_path(paths.token), site_token.previous_path(paths.token)


def test_from_one_token_to_the_next(paths: Paths) -> None:
    following, previous = beside(paths)
    assert "systemctl restart k3sagentd" in rotation.create_next(paths, paths.token)
    tokens = load_all(paths.token)
    new = following.read_bytes().strip()
    assert tokens == Tokens(OLD, next=new)
    assert following.stat().st_mode & 0o777 == 0o600
    assert f'--new-token "$(cat {paths.token})"' in rotation.rotate(paths, paths.token)
    assert load_all(paths.token) == Tokens(new, previous=OLD)
    assert {each.stat().st_mode & 0o777 for each in (paths.token, previous)} == {0o600}
    assert "etcd" in rotation.forget_previous(paths, paths.token)
    assert load_all(paths.token) == Tokens(new)


def test_each_step_can_be_given_twice(paths: Paths) -> None:
    put(beside(paths)[0], NEW)
    for _ in range(2):
        assert "k3s token rotate" in rotation.rotate(paths, paths.token)
        assert load_all(paths.token) == Tokens(NEW, previous=OLD)
    rotation.forget_previous(paths, paths.token)
    assert "nothing to forget" in rotation.forget_previous(paths, paths.token)


def syscalls(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> list[str]:
    """Every change of the disk by name; the one with number ``stop_at`` does not happen."""
    done: list[str] = []

    def stopping(name: str, real: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            if len(done) == stop_at:
                raise Killed
            done.append(name)
            return real(*args, **kwargs)

        return call

    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "open"), (os, "fsync"),
                        (os, "link"), (files, "fsync_directory")):  # fmt: skip
        monkeypatch.setattr(owner, name, stopping(name, getattr(owner, name)))
    return done


def test_killed_at_any_instant_both_tokens_are_taken_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instant, killed = 0, True
    while killed:
        paths = Paths(tmp_path / str(instant))
        paths.token.parent.mkdir(parents=True)
        put(paths.token, OLD)
        put(beside(paths)[0], NEW)
        seal(paths)
        with monkeypatch.context() as patch:
            syscalls(patch, instant)
            try:
                rotation.rotate(paths, paths.token)
                killed = False
            except Killed:
                pass
        assert set(load_all(paths.token).accepted) == {OLD, NEW}, f"at instant {instant}"
        rotation.rotate(paths, paths.token)
        assert load_all(paths.token) == Tokens(NEW, previous=OLD)
        instant += 1
    assert instant > 5, "nothing was ever killed"


def test_killed_at_any_instant_the_old_token_is_forgotten_at_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instant, killed = 0, True
    while killed:
        paths = Paths(tmp_path / str(instant))
        paths.token.parent.mkdir(parents=True)
        put(paths.token, NEW)
        put(beside(paths)[1], OLD)
        seal(paths)
        with monkeypatch.context() as patch:
            done = syscalls(patch, instant)
            try:
                rotation.forget_previous(paths, paths.token)
                killed = False
            except Killed:
                pass
        assert load_all(paths.token).shown == NEW, f"the daemon does not start after {done}"
        assert load_all(paths.token).previous in (None, OLD)
        rotation.forget_previous(paths, paths.token)
        assert [each.name for each in paths.token.parent.iterdir()] == ["token"], done
        instant += 1
    assert instant > 5, "nothing was ever killed"


def test_the_name_is_given_up_for_good_before_the_first_byte_is_overwritten(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could bring the name back with zeros behind it."""
    put(beside(paths)[1], OLD)
    done = syscalls(monkeypatch, -1)
    files.wipe(beside(paths)[1])
    first = done.index("rename")
    assert done[first : first + 4] == ["rename", "fsync_directory", "open", "fsync"]
    assert done.index("unlink") > first + 5, "removed before it was overwritten"


def test_killed_at_any_instant_the_next_token_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instant, killed = 0, True
    while killed:
        paths = Paths(tmp_path / str(instant))
        paths.token.parent.mkdir(parents=True)
        put(paths.token, OLD)
        seal(paths)
        with monkeypatch.context() as patch:
            done = syscalls(patch, instant)
            try:
                rotation.create_next(paths, paths.token)
                killed = False
            except Killed:
                pass
        made = load_all(paths.token).next
        assert made is not None or killed, done
        if made is None:
            rotation.create_next(paths, paths.token)
            assert sorted(paths.token.parent.iterdir()) == [paths.token, beside(paths)[0]]
        assert beside(paths)[0].stat().st_mode & 0o777 == 0o600
        instant += 1
    assert instant > 5, "nothing was ever killed"


@pytest.mark.parametrize("step", [rotation.create_next, rotation.rotate])
def test_not_before_the_seal(paths: Paths, step: Callable) -> None:
    if step is rotation.rotate:
        put(beside(paths)[0], NEW)
    seal(paths, sealed=False)
    with pytest.raises(UsageError, match=r"not sealed .* elect by the token"):
        step(paths, paths.token)
    (paths.state / store.FILE_NAME).unlink()
    with pytest.raises(UsageError, match="not sealed"):
        step(paths, paths.token)
    assert load_all(paths.token).shown == OLD


def test_one_rotation_at_a_time(paths: Paths) -> None:
    following, previous = beside(paths)
    put(previous, site_token.generate().encode())
    with pytest.raises(ConfigError, match="the last rotation is not over"):
        rotation.create_next(paths, paths.token)
    put(following, NEW)
    with pytest.raises(ConfigError, match="the rotation before is not over"):
        rotation.rotate(paths, paths.token)
    assert load_all(paths.token).shown == OLD


def test_rotate_without_a_next_token_says_where_it_comes_from(paths: Paths) -> None:
    with pytest.raises(ConfigError, match=r"token.next: no such file; make it with .* --next"):
        rotation.rotate(paths, paths.token)


@pytest.mark.parametrize("name", ["k3s_own_token", "k3s_token"])
def test_the_old_token_is_not_forgotten_while_k3s_goes_by_it(paths: Paths, name: str) -> None:
    put(beside(paths)[0], NEW)
    rotation.rotate(paths, paths.token)
    file: Path = getattr(paths, name)
    file.parent.mkdir(parents=True)
    file.write_text(f"K10{'a' * 64}::server:{OLD.decode()}\n")
    with pytest.raises(UsageError, match=f"{re.escape(str(file))} still has the old token"):
        rotation.forget_previous(paths, paths.token)
    file.write_text(f"K10{'a' * 64}::server:{NEW.decode()}\n")
    rotation.forget_previous(paths, paths.token)


def test_the_old_token_is_overwritten(paths: Paths) -> None:
    put(beside(paths)[0], NEW)
    rotation.rotate(paths, paths.token)
    with beside(paths)[1].open("rb") as kept:
        rotation.forget_previous(paths, paths.token)
        assert kept.read().strip(b"\0") == b"", "removed, but not overwritten"


@pytest.mark.parametrize("which", [0, 1])
def test_the_tokens_beside_are_judged_as_strictly(paths: Paths, which: int) -> None:
    file = beside(paths)[which]
    put(file, NEW, 0o644)
    with pytest.raises(ConfigError, match=f"{file.name}: token-file: mode is 0644"):
        load_all(paths.token)
    put(file, b"password")
    with pytest.raises(ConfigError, match=f"{file.name}: token-file: the token has at most"):
        load_all(paths.token)
