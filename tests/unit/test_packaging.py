# SPDX-License-Identifier: Apache-2.0
"""What the package says of the program is what the program does."""

import argparse
import io
import os
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from k3sagentd import site_token
from k3sagentd.cli.ask import why_silent
from k3sagentd.cli.main import parser
from k3sagentd.config import INSTALL_SETTINGS, OURS, PREFLIGHT, SETTINGS, load_config
from k3sagentd.errors import ConfigError
from k3sagentd.k3s.data import ETCD
from k3sagentd.paths import Paths
from k3sagentd.site_token import create
from k3sagentd.version import version
from k3sagentd.yaml_files import SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "packaging/examples"
LATER = {"lab"}
"""Its options are its own, and its package's."""


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = parser()._actions
    found = next(each for each in actions if isinstance(each, argparse._SubParsersAction))
    return dict(found.choices)


Offers = dict[str, dict[str, set[str]]]
"""By command: what may follow it, and what may follow that (the choices of an option)."""


def offers() -> Offers:
    """What the program takes."""
    return {name: _offer(inner) for name, inner in commands().items() if name not in LATER}


def _offer(command: argparse.ArgumentParser) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= {name: set()} | _offer(inner)
        elif "--help" not in action.option_strings:
            choices = {str(each) for each in action.choices or ()}
            if action.option_strings:
                found |= {each: choices for each in action.option_strings if each[:2] == "--"}
            else:
                found |= {each: set() for each in choices}
    return found


def words(command: argparse.ArgumentParser) -> set[str]:
    """Options, choices and further commands of a command."""
    found = _offer(command)
    return {*found}.union(*found.values())


# --- completions ----------------------------------------------------------------------------


def bash(*line: str) -> set[str]:
    """What bash's completion offers after ``line``."""
    script = (
        'source "$1"; shift; COMP_WORDS=("$@" ""); COMP_CWORD=$#; _k3sagentd; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    file = ROOT / "packaging/completions/k3sagentd"
    command = ["bash", "-c", script, "bash", file, "k3sagentd", *line]
    return {*subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()}


def zsh() -> tuple[set[str], Offers]:
    """The commands of zsh's completion, and what it offers after each: read from its text."""
    text = (ROOT / "packaging/completions/_k3sagentd").read_text()
    listed, cases = text.partition("case $words[2] in")[::2]
    found: Offers = {}
    for names, body in re.findall(r"^    ([a-z|-]+)\) (.*?) ;;$", cases, re.MULTILINE | re.DOTALL):
        offered: dict[str, set[str]] = {}
        for spec in re.findall(r"'([^']+)'", body):
            option, choices = spec.partition("[")[0], re.search(r"\(([^)]*)\)$", spec)
            after = set(choices[1].split()) if choices else set()
            offered |= {option: after} if option[0] == "-" else {each: set() for each in after}
        found |= dict.fromkeys(names.split("|"), offered)
    return {*re.findall(r"^    '([a-z-]+):", listed, re.MULTILINE)}, found


def fish() -> tuple[set[str], Offers]:
    """As above, of fish's completion."""
    listed: set[str] = set()
    found: Offers = {}
    for line in (ROOT / "packaging/completions/k3sagentd.fish").read_text().splitlines():
        split = shlex.split(line, comments=True)
        given = {key: split[i + 1] for i, key in enumerate(split) if key in ("-n", "-a", "-l")}
        condition, _, names = given.get("-n", "").partition(" ")
        after = set(given.get("-a", "").split())
        if condition == "__fish_use_subcommand":
            listed |= after
        for name in names.split():
            more = {f"--{given['-l']}": after} if "-l" in given else {e: set() for e in after}
            found.setdefault(name, {}).update(more)
    return listed, found


def test_bash_completes_each_command_as_the_program_takes_it() -> None:
    assert bash() == {*commands(), "--help", "--version"}
    for name, wanted in offers().items():
        assert bash(name) == {*wanted}, name
        for option, choices in wanted.items():
            assert not choices or bash(name, option) == choices, (name, option)


@pytest.mark.parametrize("shell", [zsh, fish])
def test_zsh_and_fish_complete_each_command_as_the_program_takes_it(
    shell: Callable[[], tuple[set[str], Offers]],
) -> None:
    listed, found = shell()
    assert listed == {*commands()}
    for name, wanted in offers().items():
        assert found.get(name, {}) == wanted, name


# --- manual, version, units -----------------------------------------------------------------


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


def test_a_page_that_a_message_names_is_installed_under_that_name() -> None:
    assert "\tdh_compress -X.md\n" in (ROOT / "debian/rules").read_text()
    assert "docs/*.md" in (ROOT / "debian/k3sagentd.docs").read_text().splitlines()
    for file in (ROOT / "k3sagentd").rglob("*.py"):
        for page in re.findall(r"/usr/share/doc/k3sagentd/([a-z-]+\.md)", file.read_text()):
            assert (ROOT / "docs" / page).is_file(), (file, page)


def test_the_manual_and_the_pages_name_every_option_that_is_refused() -> None:
    for page in ("docs/install.md", "man/k3sagentd-config.5.scd"):
        text = (ROOT / page).read_text()
        for option in OURS:
            assert f"`{option}`" in text or f"*{option}*" in text, (page, option)


def test_unit_and_commands_know_a_configuration_as_the_loader_does(tmp_path: Path) -> None:
    unit = (ROOT / "systemd/k3sagentd.service").read_text()
    globs = re.findall(r"^ConditionPathExistsGlob=\|/etc/k3sagentd/(.+)$", unit, re.MULTILINE)
    assert {*globs} == {f"config.yaml.d/*{suffix}" for suffix in SUFFIXES}
    for suffix in SUFFIXES:
        paths = Paths(tmp_path / suffix)
        dropin = paths.config.with_name("config.yaml.d") / f"10-site{suffix}"
        dropin.parent.mkdir(parents=True)
        dropin.with_suffix(".txt").write_text("nodes: 7\n")
        create(paths.token)
        assert "nodes: N" in str(why_silent(paths))
        dropin.write_text("nodes: 3\n")
        assert why_silent(paths) is None
        assert load_config(paths).nodes == 3


@pytest.mark.parametrize(
    "unit",
    ["k3s.service.d/53-k3sagentd-mounted.conf", "k3sagentd.service", "k3sagentd-apply.service"],
)
def test_nothing_looks_for_k3s_data_before_its_disk_is_mounted(unit: str) -> None:
    text = (ROOT / "systemd" / unit).read_text()
    (section,) = re.findall(r"^\[Unit\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    (directory,) = re.findall(r"^RequiresMountsFor=(.+)$", section, re.MULTILINE)
    assert Path(directory) == Paths().k3s_data / ETCD


def test_the_version_is_the_packages() -> None:
    first = (ROOT / "debian/changelog").read_text().splitlines()[0]
    assert f"({version()})" in first


def test_the_source_package_leaves_out_what_is_made_and_nothing_else(tmp_path: Path) -> None:
    options = (ROOT / "debian/source/options").read_text()
    patterns = re.findall(r'^tar-ignore = "(.+)"$', options, re.MULTILINE)
    for file in ("checkout/build/deb/x", "checkout/packaging/build/deb", "checkout/README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    # As dpkg-source(1) calls it.
    exclude = [f"--exclude={pattern}" for pattern in patterns]
    tar = subprocess.run(
        ["tar", "-cf", "-", *exclude, "-C", tmp_path, "checkout"], check=True, capture_output=True
    )
    with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as archive:
        names = archive.getnames()
    assert "checkout/packaging/build/deb" in names
    assert "checkout/README.md" in names
    assert not [name for name in names if name.startswith("checkout/build")]


# --- examples -------------------------------------------------------------------------------


@pytest.fixture(params=["cloud-init/user-data", "raspberry-pi/user-data"])
def user_data(request: pytest.FixtureRequest) -> dict:
    return yaml.safe_load((EXAMPLES / request.param).read_text())


def test_examples_are_configurations(tmp_path: Path, user_data: dict) -> None:
    assert user_data["apt"]["preserve_sources_list"] is True
    written = {each["path"]: each["content"] for each in user_data["write_files"]}
    texts = [
        written["/etc/k3sagentd/config.yaml"],
        (EXAMPLES / "boot-partition/config.yaml").read_text(),
    ]
    paths = Paths(tmp_path)
    paths.config.parent.mkdir(parents=True)
    for text in texts:
        paths.config.write_text(text)
        assert load_config(paths).nodes == 5


@pytest.mark.parametrize("example", ["boot-partition/config.yaml", "raspberry-pi/user-data"])
def test_the_examples_for_a_raspberry_pi_turn_its_memory_cgroup_on(example: str) -> None:
    text = (EXAMPLES / example).read_text()
    assert re.search(r"^ *fix-cmdline: true$", text, re.MULTILINE)
    assert re.search(r"^ *allow-reboot: true$", text, re.MULTILINE)


def test_no_example_has_a_token_that_a_machine_would_take() -> None:
    """Whoever forgets to replace it must not get a site whose token is public."""
    tokens: list[tuple[Path, str]] = []
    for file in EXAMPLES.rglob("*"):
        assert file.name != "token", "it comes from the person"
        if file.name == "user-data":
            for each in yaml.safe_load(file.read_text())["write_files"]:
                if each["path"].endswith("/token"):
                    assert each["permissions"] == "0600"
                    tokens.append((file, each["content"]))
    assert [file.parent.name for file, _ in tokens] == ["cloud-init"], "a Raspberry Pi's is public"
    for file, token in tokens:
        with pytest.raises(ConfigError):
            site_token.judge(file, token.strip().encode())


def test_ansible_does_not_show_the_token() -> None:
    (play,) = yaml.safe_load((EXAMPLES / "ansible/site.yaml").read_text())
    (task,) = [each for each in play["tasks"] if "/token" in str(each)]
    assert task["no_log"] is True
    assert task["diff"] is False


def test_the_pi_gen_stage_makes_an_image_also_when_it_runs_again(tmp_path: Path) -> None:
    """pi-gen (build.sh, run_stage): scripts that may be executed, EXPORT_IMAGE with a suffix."""
    stage = EXAMPLES / "pi-gen/stage-k3sagentd"
    assert re.fullmatch(r'IMG_SUFFIX="-[a-z0-9]+"\n', (stage / "EXPORT_IMAGE").read_text())
    script = stage / "00-install/01-run.sh"
    for each in (script, stage / "prerun.sh"):
        assert os.access(each, os.X_OK), each
    root = tmp_path / "rootfs"
    for directory in (root / "root", root / "boot/firmware", tmp_path / "files"):
        directory.mkdir(parents=True)
    (tmp_path / "files/k3sagentd_1_all.deb").touch()
    (tmp_path / "files/config.yaml").write_text("nodes: 5\n")
    (root / "boot/firmware/cmdline.txt").write_text("console=tty1 rootwait\n")
    chroot = "on_chroot() { cat >/dev/null; }; export -f on_chroot"
    for _ in range(2):
        command = ["bash", "-c", f"{chroot}; exec {script}"]
        environment = os.environ | {"ROOTFS_DIR": str(root)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    wanted = "console=tty1 rootwait cgroup_enable=memory\n"
    assert (root / "boot/firmware/cmdline.txt").read_text() == wanted
    assert (root / "etc/k3sagentd/config.yaml").read_text() == "nodes: 5\n"
