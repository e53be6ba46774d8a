# SPDX-License-Identifier: Apache-2.0
"""Exit codes and messages of the commands, as a shell sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k3sagentd.cli import ask
from k3sagentd.cli import main as cli
from k3sagentd.cli.ask import missing, reached, table, why_silent
from k3sagentd.cli.main import main
from k3sagentd.paths import Paths
from k3sagentd.site_token import create
from k3sagentd.upkeep import service

ROOT = Path(__file__).resolve().parents[2]
VIEW = {
    "site": {"id": "s", "phase": "sealed", "epoch": 0, "nodes": 2, "servers": 1, "seen": 2,
             "quorum": 2, "registration": ["https://10.0.0.1:6443"], "roster": ["a" * 32]},
    "node": {"id": "a" * 32, "name": "n1", "role": "server", "phase": "ready",
             "waiting_for": None, "notes": ["n2 has this machine's machine-id"]},
    "nodes": [
        {"id": "a" * 32, "name": "n1", "address": "10.0.0.1", "role": "server",
         "phase": "ready", "age_s": 0.0},
        {"id": "b" * 32, "name": "n2", "address": None, "role": "agent",
         "phase": "joining", "age_s": 3.2},
    ],
}  # fmt: skip


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "k3sagentd", *arguments],
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "K3SAGENTD_LAB": "/nonexistent/lab"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("status",), 69, "unconfigured: the daemon waits for /etc/k3sagentd/config.yaml"),
        (("registration",), 69, "the daemon does not answer"),
        (("wait", "--for", "sealed", "--timeout", "1s"), 75, "not sealed after 1 s; unconfigured"),
        (("wait", "--for", "never"), 64, "invalid choice"),
        (("cluster-init",), 64, "--force"),
        (("cluster-init", "--force"), 64, "there is no terminal to ask at; --yes"),
        (("cluster-init", "--force", "--yes"), 69, "the daemon does not answer"),
        (("fly",), 64, "invalid choice"),
        (("lab", "exec", "node1", "--", "true"), 69, "no lab is up; k3sagentd lab up"),
        (("lab", "up", "--nodes", "0"), 64, "--nodes is 0; allowed: 1 to 100"),
    ],
)
def test_codes(arguments: tuple[str, ...], code: int, message: str) -> None:
    found, said = run(*arguments)
    assert found == code
    assert message in said
    assert said.startswith("k3sagentd: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["lab"],
        ["lab", "down"],
        ["apply"],
        ["facts"],
        ["leave"],
        ["repair-addresses"],
        ["reset"],
    ],
)
def test_root_is_asked_for_in_one_line(arguments: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(arguments) == 77
    said = capsys.readouterr().err
    assert said.startswith("k3sagentd: ")
    assert "root" in said
    assert said.count("\n") == 1


def test_why_no_daemon_answers(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.config.parent.mkdir(parents=True)
    paths.config.write_text("nodes: 0\n")
    assert str(why_silent(paths)).startswith("unconfigured: the daemon waits for ")
    create(paths.token)
    assert str(why_silent(paths)).startswith(
        f"the daemon does not run: {paths.config}: nodes is 0; allowed: "
    )
    paths.config.write_text("nodes: 3\n")
    assert why_silent(paths) is None
    paths.token.chmod(0o644)
    assert f"{paths.token}: token-file: mode is 0644" in str(why_silent(paths))
    service.mark(paths, "this machine has left its site")
    assert why_silent(paths) == "the daemon does not run: this machine has left its site"


def test_config_check_says_all_that_is_wrong(tmp_path: Path, monkeypatch, capsys) -> None:
    paths = Paths(tmp_path)
    monkeypatch.setattr(cli, "Paths", lambda: paths)
    paths.config.parent.mkdir(parents=True)
    paths.config.write_text("nodes: 0\nservers: 2\n")
    assert main(["config", "check"]) == 78
    said = capsys.readouterr().err.splitlines()
    assert [each.split(": ")[1][:10] for each in said] == ["nodes is 0", "servers is"]


def test_the_table_is_aligned_and_plain() -> None:
    lines = table(VIEW, colour=False).splitlines()
    assert lines[0] == "       Site: s (sealed, epoch 0)"
    assert lines[1] == "   Machines: 2 here, 1 not heard; 1 of 1 servers ready"
    assert "       Note: n2 has this machine's machine-id" in lines
    assert lines[-2:] == [
        "n1    10.0.0.1  server  ready    now      aaaaaaaa",
        "n2    -         agent   joining  3 s ago  bbbbbbbb",
    ]


def test_what_a_machine_was_before_its_new_image_is_not_shown() -> None:
    before = {**VIEW["nodes"][0], "id": "c" * 32, "age_s": 9.0}
    anew = {**VIEW, "nodes": [*VIEW["nodes"], before]}
    assert table(anew, colour=False) == table(VIEW, colour=False)


def test_before_the_seal_the_table_counts_against_the_quorum() -> None:
    early = {**VIEW, "site": {**VIEW["site"], "phase": "discovering"}}
    assert "   Machines: 2 of 2 here, 2 must agree" in table(early, colour=False).splitlines()


def test_what_wait_waits_for() -> None:
    assert reached("nominated", VIEW)
    assert reached("joined", VIEW)
    assert not reached("complete", VIEW)


def test_wait_says_who_is_missing_where_this_machine_waits_for_nothing(monkeypatch, capsys) -> None:
    class Daemon:
        def __init__(self, path: Path) -> None: ...

        async def status(self, after: int, wait_s: float) -> dict:
            return {"rev": after + 1, "status": VIEW}

    monkeypatch.setattr(ask, "ControlClient", Daemon)
    assert main(["wait", "--for", "joined", "--timeout", "0s"]) == 0
    assert main(["wait", "--for", "complete", "--timeout", "0s"]) == 75
    assert capsys.readouterr().err == (
        "k3sagentd: not complete after 0 s; 1 of 2 machines are ready here; not ready: "
        "n2 (not heard)\n"
    )


def test_what_is_missing_is_one_short_line() -> None:
    busy = {**VIEW, "node": {**VIEW["node"], "waiting_for": "n1 to start the cluster"}}
    assert missing(busy) == "waiting for n1 to start the cluster"
    rows = [{**VIEW["nodes"][1], "name": f"m{i}", "age_s": 0} for i in range(7)]
    large = {**VIEW, "site": {**VIEW["site"], "nodes": 9}, "nodes": [VIEW["nodes"][0], *rows]}
    assert missing(large) == (
        "1 of 9 machines are ready here; not ready: m0 (joining), m1 (joining), m2 (joining), "
        "m3 (joining), m4 (joining), 2 more, 1 that this machine has not heard of"
    )


def test_the_help_says_what_each_goal_means(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["wait", "--help"])
    said = capsys.readouterr().out
    assert all(f"{goal}: " in said for goal in cli.GOALS)
