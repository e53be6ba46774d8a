# SPDX-License-Identifier: Apache-2.0
"""Root's part, piece by piece: the drop-in, the install script's contract, data moved aside."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Datastore, Order, Outcome, ServerOrAgent
from k3sagentd.discovery.addresses import Attachment
from k3sagentd.errors import ConfigError, MachineError
from k3sagentd.k3s import dropin, facts, flags
from k3sagentd.k3s.apply import apply
from k3sagentd.k3s.ca import hash_of_cacerts
from k3sagentd.k3s.data import MARKER, datastore
from k3sagentd.k3s.install import Script, method
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.paths import Paths
from k3sagentd.yaml_files import merge

AT = Attachment("eth0", 2, "10.0.0.7")
NODE = "0123456789abcdef"
INIT = Order(action=Action.INIT, epoch=0, role=ServerOrAgent.SERVER, node_name="n1", node=NODE)
JOIN = Order(
    action=Action.JOIN,
    epoch=0,
    role=ServerOrAgent.AGENT,
    node_name="n2",
    servers=("https://10.0.0.7:6443",),
    ca_hash="a" * 64,
)
URL = JOIN.servers[0]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    for each in (found.config.parent, found.run, found.dropin.parent, found.k3s_data):
        each.mkdir(parents=True)
    found.token.write_text("0f7c" * 2 + hashlib.sha256(b"t").hexdigest())
    found.token.chmod(0o600)
    configure(found)
    return found


def configure(paths: Paths, text: str = "") -> None:
    paths.config.write_text(f"nodes: 3\n{text}")


def write(paths: Paths, order: Order, server: str | None = None) -> dict:
    values = dropin.contents(order, server, load_config(paths), paths, AT)
    paths.dropin.write_bytes(dropin.render(values))
    return values


def test_the_first_server_is_told_to_found(paths: Paths) -> None:
    configure(paths, "registration-address: k3s.lan\nk3s: {cluster-cidr: 10.1.0.0/16}\n")
    values = write(paths, INIT)
    assert values == {
        "cluster-init": True,
        "token-file": str(paths.k3s_token),
        "node-name": "n1",
        "node-ip": "10.0.0.7",
        "flannel-iface": "eth0",
        "tls-san": ["k3s.lan", "10.0.0.7"],
        "cluster-cidr": "10.1.0.0/16",
        "node-label": [f"k3sagentd/node-id={NODE}"],
    }
    dropin.check(INIT, None, paths)


def test_every_way_in_is_in_a_servers_certificate(paths: Paths) -> None:
    configure(paths, "registration-address: k3s.lan\nvirtual-ip: 10.0.0.100/24\n")
    values = dropin.contents(INIT, None, load_config(paths), paths, AT, ("k3s-012345.local",))
    assert values["tls-san"] == ["k3s.lan", "10.0.0.100", "k3s-012345.local", "10.0.0.7"]


def test_an_agent_gets_no_option_of_servers(paths: Paths) -> None:
    configure(paths, "k3s: {cluster-cidr: 10.1.0.0/16, node-label: [a=b]}\n")
    values = write(paths, JOIN, URL)
    assert values["server"] == URL
    assert values["node-label"] == ["a=b"]
    assert not {"cluster-init", "cluster-cidr", "tls-san"} & values.keys()


def test_what_the_operator_set_for_k3s_is_kept(paths: Paths) -> None:
    paths.k3s_config.write_text("node-ip: 10.9.9.9\ntls-san: [mine.lan]\n")
    values = write(paths, INIT)
    assert "node-ip" not in values
    assert values["tls-san"] == ["mine.lan", "10.0.0.7"]


@pytest.mark.parametrize(
    "line", ["cluster-init: false", "server: https://x:6443", "token: x", "token-file: /x",
             "datastore-endpoint: mysql://", "node-name: other", "agent-token: x",
             "agent-token-file: /x"],
)  # fmt: skip
def test_a_file_that_overrides_us_stops_the_start_and_is_named(paths: Paths, line: str) -> None:
    write(paths, INIT)
    other = paths.dropin.parent / "99-mine.yaml"
    other.write_text(line + "\n")
    with pytest.raises(ConfigError, match=rf"99-mine.yaml: {line.split(':')[0]} is"):
        dropin.check(INIT, None, paths)


SCRIPT = """#!/bin/sh
env > {root}/env
echo "$@" > {root}/arguments
mkdir -p {root}/etc/systemd/system
echo '[Service]' > {root}/etc/systemd/system/k3s.service
"""


def script(paths: Paths, text: str, more: str = "") -> Script:
    file = paths.root / "install.sh"
    file.write_text(text.replace("{root}", str(paths.root)))
    configure(paths, f"install:\n  script: {file}\n{more}")
    return Script(load_config(paths), paths)


def test_exec_is_refused_under_systemd(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(paths, "install: {method: exec}\n")
    method(load_config(paths), paths)
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    with pytest.raises(ConfigError, match=r"install.method is exec; allowed .*: script"):
        method(load_config(paths), paths)


def test_the_install_script_starts_nothing_and_sees_no_token(paths: Paths, monkeypatch) -> None:
    monkeypatch.setenv("K3S_TOKEN", "leak")
    script(paths, SCRIPT, "  channel: latest\n").install(INIT)
    env = dict(line.split("=", 1) for line in (paths.root / "env").read_text().splitlines())
    assert env["INSTALL_K3S_SKIP_START"] == env["INSTALL_K3S_SKIP_ENABLE"] == "true"
    assert env["INSTALL_K3S_CHANNEL"] == "latest"
    assert not [key for key in env if key.startswith("K3S_")]
    assert (paths.root / "arguments").read_text() == "server\n"


def test_the_sites_version_goes_before_the_channel(paths: Paths) -> None:
    script(paths, SCRIPT).install(replace(INIT, k3s_version="v1.33.4+k3s1"))
    env = (paths.root / "env").read_text()
    assert "INSTALL_K3S_VERSION=v1.33.4+k3s1\n" in env
    assert "INSTALL_K3S_CHANNEL" not in env


def test_a_script_with_another_hash_is_not_run(paths: Paths) -> None:
    method = script(paths, SCRIPT, f"  script-sha256: '{'0' * 64}'\n")
    with pytest.raises(MachineError, match="but script-sha256 is 0000"):
        method.install(INIT)
    assert not (paths.root / "env").exists()


def test_a_script_that_fails_says_why(paths: Paths) -> None:
    method = script(paths, "echo '[ERROR]  no space left'; exit 1\n")
    with pytest.raises(MachineError, match=r"ended with 1: \[ERROR\]  no space left"):
        method.install(INIT)


def test_a_script_that_makes_no_unit_is_not_believed(paths: Paths) -> None:
    with pytest.raises(MachineError, match=r"made no .*k3s.service"):
        script(paths, "exit 0\n").install(INIT)


SECRETS = {
    "token": "hunter2",
    "agent-token": "hunter2",
    "token-file": "hunter2",
    "agent-token-file": "hunter2",
    "datastore-endpoint": "mysql://k3s:hunter2@tcp(10.0.0.9:3306)/k3s",
    "server": "https://k3s:hunter2@10.0.0.9:6443",
}


@pytest.mark.parametrize("key", SECRETS)
def test_no_secret_of_another_file_is_shown(paths: Paths, key: str) -> None:
    write(paths, INIT)
    (paths.dropin.parent / "99-mine.yaml").write_text(f"{key}: {SECRETS[key]}\n")
    with pytest.raises(ConfigError, match=f"{key} is set; allowed") as caught:
        dropin.check(INIT, None, paths)
    assert "hunter2" not in str(caught.value)


def test_no_option_with_a_secret_is_among_those_that_the_site_is_told() -> None:
    options = {*flags.SECRET, "kubelet-arg", "etcd-arg", "private-registry", "datastore-keyfile"}
    assert flags.shared(dict.fromkeys(options, "hunter2")) == {}
    assert {flags.shown(key, "hunter2") for key in flags.SECRET} == {"set"}
    assert flags.shown("kube-apiserver-arg", ["x=hunter2"]) == "set"
    assert flags.shown("token-file", "/etc/x") == "'/etc/x'"
    assert flags.shown("cluster-init", True) == "True"


def test_the_reason_why_a_start_failed_has_no_secret(paths: Paths) -> None:
    """An init node proposes it as the reason to abandon the epoch: every machine stores it."""
    for key, secret in SECRETS.items():
        paths.k3s_config.write_text(f"{key}: {secret}\n")
        (paths.dropin.parent / "99-mine.yaml").write_text(f"{key}: {secret}\n")
        binary = paths.root / "k3s"
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)
        configure(
            paths,
            f"install: {{method: exec, binary: {binary}}}\n"
            "ignore-preflight: [clock, ports, memory, disk, cgroup]\n",
        )
        write_order(paths, INIT)
        apply(paths)
        result = read_result(paths)
        assert result is not None
        assert f"{key} is set" in str(result.reason)
        assert "hunter2" not in paths.result.read_text()


# --- apply ----------------------------------------------------------------------------------


def data(paths: Paths, epoch: int | None) -> Path:
    wal = paths.k3s_data / "server/db/etcd/member/wal"
    wal.mkdir(parents=True)
    if epoch is not None:
        (paths.k3s_data / MARKER).write_text(json.dumps({"epoch": epoch, "node": NODE}))
    paths.installed.parent.mkdir(parents=True, exist_ok=True)
    paths.installed.touch()
    return wal


def outcome(paths: Paths, order: Order) -> tuple[Outcome, str | None]:
    configure(paths, "install: {method: exec}\n")
    write_order(paths, order)
    apply(paths)
    result = read_result(paths)
    assert result is not None
    assert result.order == order
    return result.outcome, result.reason


STAND_DOWN = replace(INIT, action=Action.STAND_DOWN, epoch=2)


def test_standing_down_moves_data_aside_and_never_overwrites(paths: Paths) -> None:
    for expected in ("k3s.abandoned-2", "k3s.abandoned-2-2"):
        data(paths, 2)
        write(paths, INIT)
        assert outcome(paths, STAND_DOWN)[0] is Outcome.DONE
        aside = paths.k3s_data.with_name(expected)
        assert (aside / "server/db/etcd/member/wal").is_dir()
        assert not paths.dropin.exists()


@pytest.mark.parametrize("epoch", [None, 1])
def test_data_that_is_not_of_that_epoch_is_not_touched(paths: Paths, epoch: int | None) -> None:
    wal = data(paths, epoch)
    found, reason = outcome(paths, STAND_DOWN)
    assert wal.is_dir()
    if epoch is None:  # it was there before the site: there is nothing of ours to give up
        assert found is Outcome.DONE
    else:
        assert found is Outcome.FAILED_FOR_GOOD
        assert str(paths.k3s_data) in str(reason)


def test_a_sqlite_cluster_is_not_dragged_into_another(paths: Paths) -> None:
    (paths.k3s_data / "server/db").mkdir(parents=True)
    (paths.k3s_data / "server/db/state.db").touch()
    found, reason = outcome(paths, JOIN)
    assert found is Outcome.FAILED_FOR_GOOD
    assert "single-node cluster of its own (SQLite)" in str(reason)


def test_a_missing_binary_is_tried_again_later(paths: Paths) -> None:
    configure(paths, "install: {method: exec, binary: /nowhere/k3s}\nignore-preflight: [clock]\n")
    prepare = replace(JOIN, action=Action.PREPARE)
    write_order(paths, prepare)
    assert apply(paths) == os.EX_TEMPFAIL
    result = read_result(paths)
    assert result is not None
    assert result.outcome is Outcome.FAILED


def test_what_is_on_the_disk_is_told_apart(paths: Paths) -> None:
    assert datastore(paths.k3s_data) is Datastore.NONE
    (paths.k3s_data / "agent").mkdir()
    (paths.k3s_data / "agent/client-kubelet.crt").touch()
    assert datastore(paths.k3s_data) is Datastore.AGENT
    data(paths, None)
    assert datastore(paths.k3s_data) is Datastore.ETCD


# --- what nobody foresaw --------------------------------------------------------------------

PREPARE = replace(JOIN, action=Action.PREPARE)


@pytest.mark.parametrize("at", ["k3sagentd.k3s.apply.preflight", "k3sagentd.k3s.facts.write_facts"])
def test_a_fault_of_ours_is_a_failed_order_with_a_reason(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    """Else the order would stand as one that runs, and be given again after an hour."""

    def fails(*_: object) -> Iterator[str]:
        raise TypeError("unhashable: confidential")

    binary = paths.root / "k3s"
    binary.touch(0o755)
    configure(paths, f"install: {{method: exec, binary: {binary}}}\n")
    monkeypatch.setattr("k3sagentd.k3s.apply.preflight", lambda *_: iter(()))
    monkeypatch.setattr(at, fails)
    write_order(paths, PREPARE)
    assert apply(paths) == os.EX_TEMPFAIL
    result = read_result(paths)
    assert result is not None
    assert result.outcome is Outcome.FAILED
    assert re.search(
        r"a fault of k3sagentd's own: TypeError in k3s/apply.py:\d+; please", str(result.reason)
    )
    assert "confidential" not in str(result.reason)
    assert "unhashable: confidential" in caplog.text
    assert "Traceback" in caplog.text


def test_an_operators_list_that_is_none_is_named(paths: Paths) -> None:
    paths.k3s_config.write_text("node-label: {zone: a}\n")
    with pytest.raises(ConfigError, match=r"k3s/config.yaml: node-label is .*; allowed: a text, a"):
        write(paths, INIT)
    paths.k3s_config.unlink()
    write(paths, INIT)
    (paths.dropin.parent / "99.yaml").write_text("tls-san: [[a]]\n")
    with pytest.raises(ConfigError, match=r"99.yaml: tls-san is \[\['a'\]\]; allowed: a text"):
        dropin.check(INIT, None, paths)


def test_facts_can_be_told_of_any_yaml(paths: Paths) -> None:
    paths.k3s_config.write_text("cluster-domain: 2025-01-01\ndisable: {a: [2025-01-01]}\n")
    found = facts.collect(paths, load_config(paths)).shared_flags
    assert found == {"cluster-domain": '"2025-01-01"', "disable": '{"a": ["2025-01-01"]}'}


# --- small things ---------------------------------------------------------------------------


def test_the_body_of_a_server_that_is_starting_is_never_hashed() -> None:
    assert hash_of_cacerts(b"starting") is None


def test_one_certificate_is_hashed_as_its_body() -> None:
    body = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    assert hash_of_cacerts(body) == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (["traefik", "servicelb"], "servicelb,traefik"),
        (["servicelb"], "servicelb"),
        ("10.1.0.0/16", ["10.1.0.0/16"]),
    ],
)
def test_equal_settings_have_one_form(a: object, b: object) -> None:
    assert flags.canonical(a) == flags.canonical(b)
    assert flags.canonical(flags.plain(flags.canonical(a))) == flags.canonical(a)


def test_booleans_keep_their_kind() -> None:
    assert flags.plain(flags.canonical(True)) is True


def test_merged_values_know_their_file(paths: Paths) -> None:
    paths.k3s_config.write_text("debug: true\n")
    (paths.dropin.parent / "10.yaml").write_text("debug: false\n")
    merged = merge(paths.k3s_config)
    assert merged.values["debug"] is False
    assert merged.file_of("debug").name == "10.yaml"
