# SPDX-License-Identifier: Apache-2.0
import errno
import os
import secrets
import stat
from pathlib import Path

import pytest

from k3sagentd import site_token
from k3sagentd.errors import ConfigError

WEAK = [
    b"",
    b"password" * 4,
    b"a" * 100,
    b"0123456789abcdef" * 2,
    b"correcthorsebatterystaple",
    b"correct-horse-battery-staple",
    b"Password123456789!",
]
FORMS = [b"abcdef.0123456789abcdef", b"K10" + b"a1b2" * 16, b"server:" + b"a8" * 20, b"a b" * 30]


@pytest.mark.parametrize("token", WEAK + FORMS)
def test_weak_or_unfit_tokens_are_refused_without_being_shown(token: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        site_token.judge(Path("/t"), token)
    message = str(caught.value)
    assert message.startswith("/t: token-file: ")
    assert "k3sagentd token create" in message
    assert not token or token.decode() not in message


@pytest.mark.parametrize("make", [secrets.token_hex, lambda n: secrets.token_hex(n).upper()])
def test_every_random_token_of_128_bits_passes(make) -> None:
    for _ in range(2000):
        token = make(16).encode()
        assert site_token.judge(Path("/t"), token) == token


def test_create_is_private_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "etc/token"
    site_token.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        site_token.create(path)
    assert path.read_bytes() == before
    assert site_token.load(path) == before.strip()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="token: cannot be written: No space left"):
            site_token.create(tmp_path / "token")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_create_without_links(tmp_path: Path, monkeypatch, there: bool) -> None:
    """On FAT, as a card's boot partition is."""

    def fat(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fat)
    path = tmp_path / "token"
    if there:
        path.write_text("x")
        with pytest.raises(ConfigError, match="not overwritten"):
            site_token.create(path)
        assert path.read_text() == "x"
    else:
        site_token.create(path)
        assert site_token.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    site_token.create(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode is 0640.*allowed: 0600"):
        site_token.load(path)


def test_a_missing_token_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token-file: no such file; make one with"):
        site_token.load(tmp_path / "none")


def test_a_credential_of_systemd_goes_first(tmp_path: Path, monkeypatch) -> None:
    token = secrets.token_hex(32)
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert site_token.load(Path("/nowhere")) == token.encode()


def test_what_the_unit_passes_for_a_missing_file_is_no_token(tmp_path: Path, monkeypatch) -> None:
    """``SetCredential=token.next:none`` in systemd/k3sagentd.service."""
    given, token = tmp_path / "given", secrets.token_hex(32)
    given.mkdir()
    for name in ("token", "token.next", "token.previous"):
        (given / name).write_text("none")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    with pytest.raises(ConfigError, match="no such file"):
        site_token.load_all(tmp_path / "token")
    (given / "token").write_text(token)
    assert site_token.load_all(tmp_path / "token") == site_token.Tokens(token.encode())
    (given / "token.next").write_text(token[::-1])
    assert site_token.load_all(tmp_path / "token").next == token[::-1].encode()


def test_the_unit_says_of_each_token_that_it_may_be_missing() -> None:
    unit = (Path(__file__).parents[2] / "systemd/k3sagentd.service").read_text().splitlines()
    for name in ("token", "token.next", "token.previous"):
        assert f"LoadCredential={name}:/etc/k3sagentd/{name}" in unit
        assert f"SetCredential={name}:{site_token.NO_CREDENTIAL.decode()}" in unit


def test_a_token_that_root_wiped_is_not_missed(tmp_path: Path) -> None:
    path, note = tmp_path / "token", tmp_path / "token.forgotten"
    with pytest.raises(ConfigError, match="no such file"):
        site_token.load_unless_forgotten(path, note)
    note.touch()
    assert site_token.load_unless_forgotten(path, note) is None
    site_token.create(path)
    assert site_token.load_unless_forgotten(path, note) is not None
