# SPDX-License-Identifier: Apache-2.0
"""Zero touch: where configuration and token come from, in which order, and what is left there."""

from pathlib import Path

import pytest

from k3sagentd import provision, site_token
from k3sagentd.files import wiping_path
from k3sagentd.paths import Paths

TOKEN = site_token.generate()
OTHER = site_token.generate()
CONFIG = "nodes: 5\n"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def fill(directory: Path, *, token: str | None = None, config: str | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if token is not None:
        (directory / "token").write_text(token)
    if config is not None:
        (directory / "config.yaml").write_text(config)
    return directory


def credentials(paths: Paths, **files: str) -> Path:
    directory = paths.root / "credentials"
    directory.mkdir()
    for name, text in files.items():
        (directory / f"k3sagentd.{name}").write_text(text)
    return directory


@pytest.mark.parametrize("partition", [0, 1])
def test_from_the_boot_partition_and_the_token_is_wiped(paths: Paths, partition: int) -> None:
    card = fill(paths.boot_partitions[partition], token=TOKEN + "\r\n", config=CONFIG)
    kept = (card / "token").open("rb")
    provision.provision(paths, None)
    assert paths.token.read_text() == TOKEN + "\n"
    assert paths.token.stat().st_mode & 0o777 == 0o600
    assert paths.config.read_text() == CONFIG
    assert not (card / "token").exists()
    with kept:
        assert kept.read().strip(b"\0") == b"", "removed, but not overwritten"
    note = (card / provision.NOTE).read_text()
    assert f"{card}/config.yaml is {paths.config} now" in note
    assert TOKEN not in note


def test_what_is_in_etc_goes_first_then_credentials_then_the_card(paths: Paths) -> None:
    card = fill(paths.boot_partitions[0], token=OTHER, config="nodes: 9\n")
    provision.provision(paths, credentials(paths, token=TOKEN, config=CONFIG))
    assert paths.token.read_text().strip() == TOKEN
    assert paths.config.read_text() == CONFIG
    assert (card / "token").read_text() == OTHER, "not ours to remove: it was not taken"
    assert "was not taken" in (card / provision.NOTE).read_text()


def test_each_of_the_two_for_itself(paths: Paths) -> None:
    fill(paths.boot_partitions[0], token=TOKEN)
    fill(paths.config.parent, config=CONFIG)
    provision.provision(paths, None)
    assert paths.token.read_text().strip() == TOKEN
    assert paths.config.read_text() == CONFIG


def test_a_drop_in_is_a_configuration(paths: Paths) -> None:
    dropins = paths.config.with_name("config.yaml.d")
    dropins.mkdir(parents=True)
    (dropins / "README").touch()
    card = fill(paths.boot_partitions[0], config=CONFIG)
    (dropins / "10-site.yaml").write_text("nodes: 3\n")
    provision.provision(paths, None)
    assert not paths.config.exists()
    (dropins / "10-site.yaml").rename(dropins / "10-site.yml")
    provision.provision(paths, None)
    assert not paths.config.exists()
    (dropins / "10-site.yml").unlink()
    provision.provision(paths, None)
    assert paths.config.exists(), f"{card} was not taken"


def test_what_is_wrong_is_not_taken_and_said(paths: Paths) -> None:
    card = fill(paths.boot_partitions[0], token="secret", config="nodes: many\n")
    provision.provision(paths, None)
    assert not paths.token.exists()
    assert not paths.config.exists()
    assert (card / "token").exists()
    note = (card / provision.NOTE).read_text()
    assert f"not taken: {card}/config.yaml: nodes is 'many'; allowed: a number" in note
    assert f"not taken: {card}/token: token-file: the token has at most" in note
    assert "secret" not in note


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("token.txt", "token"),
        ("TOKEN.TXT", "token"),
        ("config.yml", "config.yaml"),
        ("config.yaml.txt", "config.yaml"),
        ("Config.txt", "config.yaml"),
    ],
)
def test_a_wrong_name_is_said(paths: Paths, name: str, meant: str) -> None:
    card = fill(paths.boot_partitions[0])
    (card / name).write_text(TOKEN)
    (card / "README.txt").touch()
    provision.provision(paths, None)
    note = card / provision.NOTE
    wanted = f"{card}/{name} was not looked at: rename it to {meant}, or remove it\r\n"
    assert note.read_bytes().decode() == wanted
    assert not paths.token.exists()
    before = note.stat().st_ino
    provision.provision(paths, None)
    assert note.stat().st_ino == before, "written anew at every boot"


def test_a_token_that_is_no_token_for_the_daemon_is_none_here(paths: Paths) -> None:
    card = fill(paths.boot_partitions[0], token=TOKEN * (site_token.SIZE_LIMIT_BYTES // 64 + 1))
    provision.provision(paths, None)
    assert not paths.token.exists()
    note = (card / provision.NOTE).read_text()
    assert f"not taken: {card}/token: cannot be read: larger than 4096 bytes" in note


def test_a_power_cut_before_the_wipe_is_made_good(paths: Paths) -> None:
    """The token stands in both places then."""
    card = fill(paths.boot_partitions[0], token=TOKEN)
    fill(paths.token.parent, token=TOKEN + "\n")
    provision.provision(paths, None)
    assert not (card / "token").exists()
    assert paths.token.read_text().strip() == TOKEN


def test_a_power_cut_in_the_wipe_is_made_good(paths: Paths) -> None:
    """On the card, and of what was being forgotten when the power went."""
    card = fill(paths.boot_partitions[0]) / "token"
    fill(paths.token.parent, token=TOKEN + "\n")
    for each in (card, site_token.previous_path(paths.token)):
        wiping_path(each).write_text(OTHER)
        kept = wiping_path(each).open("rb")
        provision.provision(paths, None)
        assert not wiping_path(each).exists()
        with kept:
            assert kept.read().strip(b"\0") == b"", "removed, but not overwritten"
    assert paths.token.read_text().strip() == TOKEN


def test_what_cannot_be_wiped_is_named(paths: Paths, monkeypatch) -> None:
    card = fill(paths.boot_partitions[0], token=TOKEN)

    def broken(path: Path) -> None:
        path.rename(wiping_path(path))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(provision, "wipe", broken)
    provision.provision(paths, None)
    assert f"{card}/.token.wiped could not be removed" in (card / provision.NOTE).read_text()


def test_a_second_time_changes_nothing(paths: Paths) -> None:
    fill(paths.boot_partitions[0], token=TOKEN, config=CONFIG)
    provision.provision(paths, None)
    files = {p: p.read_bytes() for p in paths.root.rglob("*") if p.is_file()}
    provision.provision(paths, None)
    assert {p: p.read_bytes() for p in paths.root.rglob("*") if p.is_file()} == files


def test_a_token_that_was_forgotten_comes_back_only_on_purpose(paths: Paths) -> None:
    paths.token_forgotten.parent.mkdir(parents=True)
    paths.token_forgotten.touch()
    provision.provision(paths, credentials(paths, token=OTHER))
    assert not paths.token.exists(), "it is given at every boot"
    fill(paths.boot_partitions[0], token=TOKEN)
    provision.provision(paths, None)
    assert paths.token.read_text().strip() == TOKEN
