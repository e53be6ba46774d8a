# SPDX-License-Identifier: Apache-2.0
"""What the package says of the program is what the program does."""

import argparse
import re
from pathlib import Path

import pytest
import yaml

from k3sagentd.cli.ask import _unconfigured
from k3sagentd.cli.main import parser
from k3sagentd.config import INSTALL_SETTINGS, PREFLIGHT, SETTINGS, load_config
from k3sagentd.paths import Paths
from k3sagentd.version import version
from k3sagentd.yaml_files import SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS = ("k3sagentd", "_k3sagentd", "k3sagentd.fish")
LATER = {"lab"}
"""Its options are its own, and its package's."""


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = parser()._actions
    found = next(each for each in actions if isinstance(each, argparse._SubParsersAction))
    return dict(found.choices)


def words(command: argparse.ArgumentParser) -> set[str]:
    """Options, choices and further commands of a command."""
    found: set[str] = set()
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= {name} | words(inner)
        elif "--help" not in action.option_strings:
            found |= {each for each in action.option_strings if each.startswith("--")}
            found |= set(action.choices or ())
    return found


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_know_every_command_and_option(name: str) -> None:
    text = (ROOT / "packaging/completions" / name).read_text()
    known = set(re.findall(r"[a-z][a-z-]+", text))
    for command, inner in commands().items():
        assert command in known, command
        for word in words(inner) if command not in LATER else ():
            assert word.removeprefix("--") in known, (command, word)


def test_the_manual_has_every_command_and_every_key() -> None:
    manual = (ROOT / "man/k3sagentd.1.scd").read_text()
    for command, inner in commands().items():
        assert f"*{command}" in manual, command
        for word in words(inner) if command not in LATER else ():
            assert word in manual, (command, word)
    keys = (ROOT / "man/k3sagentd-config.5.scd").read_text()
    for setting in SETTINGS:
        assert f"*{setting.key}*" in keys or setting.key == "install", setting.key
    for setting in INSTALL_SETTINGS:
        assert f"*install.{setting.key}*" in keys, setting.key
    for check in PREFLIGHT:
        assert f"_{check}_" in keys, check


def test_unit_and_commands_know_a_configuration_as_the_loader_does(tmp_path: Path) -> None:
    unit = (ROOT / "systemd/k3sagentd.service").read_text()
    globs = re.findall(r"^ConditionPathExistsGlob=\|/etc/k3sagentd/(.+)$", unit, re.MULTILINE)
    assert {*globs} == {f"config.yaml.d/*{suffix}" for suffix in SUFFIXES}
    for suffix in SUFFIXES:
        paths = Paths(tmp_path / suffix)
        dropin = paths.config.with_name("config.yaml.d") / f"10-site{suffix}"
        dropin.parent.mkdir(parents=True)
        dropin.with_suffix(".txt").write_text("nodes: 7\n")
        paths.token.touch()
        assert "nodes: N" in str(_unconfigured(paths))
        dropin.write_text("nodes: 3\n")
        assert _unconfigured(paths) is None
        assert load_config(paths).nodes == 3


def test_the_version_is_the_packages() -> None:
    first = (ROOT / "debian/changelog").read_text().splitlines()[0]
    assert f"({version()})" in first


def test_examples_are_configurations(tmp_path: Path) -> None:
    examples = ROOT / "packaging/examples"
    user_data = yaml.safe_load((examples / "cloud-init/user-data").read_text())
    written = {each["path"]: each for each in user_data["write_files"]}
    assert written["/etc/k3sagentd/token"]["permissions"] == "0600"
    texts = [
        written["/etc/k3sagentd/config.yaml"]["content"],
        (examples / "boot-partition/config.yaml").read_text(),
    ]
    paths = Paths(tmp_path)
    paths.config.parent.mkdir(parents=True)
    for text in texts:
        paths.config.write_text(text)
        assert load_config(paths).nodes == 5
    assert yaml.safe_load((examples / "ansible/site.yaml").read_text())
