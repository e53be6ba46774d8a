# SPDX-License-Identifier: Apache-2.0
"""K3s's install script and units: what is started stays enabled, and of its release."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.config import load_config
from k3sagentd.core.k3s import Action, Order, Outcome
from k3sagentd.errors import MachineError
from k3sagentd.k3s import apply as root
from k3sagentd.k3s import install
from k3sagentd.k3s.install import Exec, Script
from k3sagentd.paths import Paths
from tests.unit.rooted import (
    AGENT,
    AS_AGENT,
    AS_SERVER,
    HASH,
    INIT,
    JOIN,
    JOIN_AGENT,
    SERVER,
    STATE,
    TOKEN,
    WAL,
    Machine,
)

UNIT = {SERVER: "k3s.service", AGENT: "k3s-agent.service"}
PREPARE = replace(JOIN, action=Action.PREPARE)
OLD, RELEASE, NEWEST = "v1.32.1+k3s1", "v1.33.4+k3s1", "v1.35.0+k3s1"
SYSTEMCTL = """#!/bin/sh
cd {root}/systemd
echo "$@" >> said
command=$1 now=
shift
[ "$1" != --now ] || { now=yes; shift; }
[ "$1" != --no-block ] || shift
case $command in
is-active) for unit; do [ -e "active/$unit" ] && echo active || echo inactive; done ;;
enable) touch "enabled/$1" ;;
disable)
    rm -f "enabled/$1"
    [ -z "$now" ] || rm -f "active/$1" ;;
start | restart)
    [ -s "{root}/etc/systemd/system/$1" ] || { echo "Unit $1 not found."; exit 5; }
    touch "active/$1"
    cd {root}/var/lib/rancher/k3s/server/db 2>/dev/null || exit 0
    grep -q cluster-init {root}/etc/rancher/k3s/config.yaml.d/* || exit 0
    [ ! -e state.db ] || { mkdir -p etcd/member/wal; mv state.db state.db.migrated; } ;;
stop) rm -f "active/$1" ;;
esac
"""
INSTALL = """#!/bin/sh
set -e
bin=${INSTALL_K3S_BIN_DIR:-{root}/usr/local/bin}
[ "$1" = server ] && unit=k3s.service || unit=k3s-agent.service
echo "$1" >> {root}/runs
env > {root}/env
if [ "${INSTALL_K3S_SKIP_DOWNLOAD:-}" != true ]; then
    release=${INSTALL_K3S_VERSION:-v1.35.0+k3s1}
    printf '#!/bin/sh\\necho "k3s version %s (0a1b2c3d)"\\n' "$release" > "$bin/k3s"
    chmod 755 "$bin/k3s"
fi
systemctl disable "$unit"
rm -f "{root}/etc/systemd/system/$unit"
if [ -e {root}/cut ]; then rm {root}/cut; exit 137; fi
printf '[Service]\\nExecStart=%s/k3s %s\\n' "$bin" "$1" > "{root}/etc/systemd/system/$unit"
"""


class Scripted(Machine):
    """A machine with an install script that does what K3s's does, and a systemctl."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(path, monkeypatch)
        for each in ("etc/systemd/system", "usr/local/bin", "bin", "systemd/active",
                     "systemd/enabled"):  # fmt: skip
            (path / each).mkdir(parents=True)
        for name, text in (("bin/systemctl", SYSTEMCTL), ("install.sh", INSTALL)):
            (path / name).write_text(text.replace("{root}", str(path)))
            (path / name).chmod(0o755)
        monkeypatch.setattr(root, "method", lambda config, paths: Script(config, paths))
        monkeypatch.setattr(install, "PATH", f"{path}/bin:{path}/usr/local/bin:{install.PATH}")
        monkeypatch.setenv("PATH", install.PATH)
        self.configure()

    def configure(self, text: str = "") -> None:
        script = self.paths.root / "install.sh"
        self.paths.config.write_text(f"nodes: 3\ninstall: {{script: {script}{text}}}\n")

    def does(self, order: Order, *what: str) -> None:
        result = self.apply(order)
        assert result.outcome is Outcome.DONE, result

    def systemctl(self, *words: str) -> None:
        subprocess.run(["systemctl", *words], check=True)

    def power_cut(self) -> None:
        """Off and on: systemd starts what is enabled."""
        active, enabled = (self.paths.root / "systemd" / each for each in ("active", "enabled"))
        for each in active.iterdir():
            each.unlink()
        for each in enabled.iterdir():
            self.systemctl("start", each.name)

    @property
    def units(self) -> set[str]:
        """What systemd has, as ``name: active``."""
        systemd = self.paths.root / "systemd"
        return {f"{each.parent.name} {each.name}" for each in systemd.glob("*/*")}

    def runs(self, *units: str) -> bool:
        """Whether these, and no others, are active and enabled."""
        return self.units == {f"{how} {unit}" for how in ("active", "enabled") for unit in units}

    @property
    def installs(self) -> list[str]:
        file = self.paths.root / "runs"
        return file.read_text().split() if file.exists() else []

    @property
    def release(self) -> str:
        """What the binary says that it is."""
        binary = self.paths.root / "usr/local/bin/k3s"
        said = subprocess.run([binary, "--version"], check=True, capture_output=True, text=True)
        return said.stdout.split()[2]

    @property
    def asked(self) -> set[str]:
        """What the script was told, the last time that it ran."""
        lines = (self.paths.root / "env").read_text().splitlines()
        return {line for line in lines if line.startswith("INSTALL_K3S_")}

    def has(self, release: str, *units: str) -> None:
        """K3s is installed and runs."""
        binary = self.paths.root / "usr/local/bin/k3s"
        binary.write_text(f'#!/bin/sh\necho "k3s version {release} (0a1b2c3d)"\n')
        binary.chmod(0o755)
        for unit in units:
            role = "agent" if unit == UNIT[AGENT] else "server"
            text = f"[Service]\nExecStart={binary} {role}\n"
            (self.paths.root / "etc/systemd/system" / unit).write_text(text)
            self.systemctl("enable", unit)
            self.systemctl("start", unit)


@pytest.fixture
def m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(tmp_path, monkeypatch)


# --- enabled --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [INIT, JOIN, JOIN_AGENT])
def test_what_has_not_joined_before_a_power_cut_starts_at_the_boots_after_it(
    m: Scripted, order: Order
) -> None:
    m.does(order)
    unit = UNIT[order.role]
    assert m.runs(unit)
    m.power_cut()
    # The daemon knows nothing of before: it prepares, and joins again.
    if order is JOIN:
        m.does(PREPARE)
        assert m.runs(unit)
    m.does(order)
    assert m.runs(unit)
    assert m.installs == [order.role], "what runs is not installed again"
    m.put(*(AS_AGENT if order.role is AGENT else (*AS_SERVER, WAL)))
    m.does(order)
    assert m.runs(unit)


@pytest.mark.parametrize("cut", ["in the script", "before the start"])
def test_data_whose_unit_is_gone_gets_it_back_enabled(
    m: Scripted, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new system over an old disk, and the power goes once more."""
    m.put(*AS_SERVER, WAL)
    if cut == "in the script":
        (m.paths.root / "cut").touch()
        assert m.apply(JOIN).outcome is Outcome.FAILED
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Script, "start", _dies)
            assert m.apply(JOIN).outcome is Outcome.FAILED
    assert m.units == set()
    m.power_cut()
    m.does(JOIN)
    assert m.runs(UNIT[SERVER])
    assert m.release == NEWEST
    m.does(JOIN)
    assert m.runs(UNIT[SERVER])


def _dies(*_: object, **__: object) -> None:
    raise MachineError("the power is cut")


STOP = Script.stop


def _stops_and_dies(script: Script) -> None:
    STOP(script)
    _dies()


def test_a_member_whose_unit_a_cut_removed_keeps_its_binary(m: Scripted) -> None:
    m.put(*AS_SERVER, WAL)
    m.ours(SERVER)
    m.has(OLD)
    (m.paths.root / "etc/systemd/system" / UNIT[SERVER]).touch()  # empty: never written out
    m.does(JOIN)
    assert m.runs(UNIT[SERVER])
    assert m.release == OLD
    assert "INSTALL_K3S_SKIP_DOWNLOAD=true" in m.asked


@pytest.mark.parametrize("role", [SERVER, AGENT])
def test_a_member_that_its_owner_disabled_stays_so(m: Scripted, role: object) -> None:
    order = JOIN if role is SERVER else JOIN_AGENT
    m.does(order)
    m.put(*(AS_AGENT if role is AGENT else (*AS_SERVER, WAL)))
    m.does(order)
    m.systemctl("disable", UNIT[order.role])
    m.at = replace(m.at, address="10.0.0.8")  # an agent has to follow
    m.does(order)
    assert m.units == {f"active {UNIT[order.role]}"}
    m.systemctl("stop", UNIT[order.role])
    m.does(order)
    assert m.units == set()


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after a download that failed"])
def test_an_agent_that_a_promotion_has_stopped_is_started_when_it_stays_one(
    m: Scripted, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT)
    m.has(OLD, UNIT[AGENT])
    with monkeypatch.context() as patch:
        patch.setattr(Script, "stop", _stops_and_dies)
        assert m.apply(JOIN).outcome is Outcome.FAILED
    m.power_cut()
    assert m.units == set()
    if again:
        (m.paths.root / "cut").touch()
        assert m.apply(JOIN).outcome is Outcome.FAILED
        m.power_cut()
    m.does(JOIN_AGENT)
    assert m.runs(UNIT[AGENT])
    m.systemctl("disable", "--now", UNIT[AGENT])
    m.does(JOIN_AGENT)
    assert m.units == set(), "that was its owner"


def test_a_server_that_a_demotion_has_stopped_is_started_when_it_stays_one(
    m: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    m.put(*AS_SERVER, WAL)
    m.ours(SERVER)
    m.has(OLD, UNIT[SERVER])
    with monkeypatch.context() as patch:
        patch.setattr(Script, "stop", _stops_and_dies)
        assert m.apply(replace(JOIN_AGENT, action=Action.STEP_DOWN)).outcome is Outcome.FAILED
    m.power_cut()
    assert m.units == set()
    m.does(JOIN)
    assert m.runs(UNIT[SERVER])


def test_an_agent_that_prepared_to_be_a_server_is_left_to_its_owner(m: Scripted) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT)
    m.has(OLD, UNIT[AGENT])
    m.does(PREPARE)
    m.systemctl("disable", "--now", UNIT[AGENT])
    m.does(JOIN_AGENT)
    assert m.units == set()


@pytest.mark.parametrize("cut", ["halt", "stop"])
def test_k3s_that_is_stopped_while_it_joins_starts_at_the_boot_after_a_power_cut(
    m: Scripted, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """Until it is sure that it has not become a member: then the cluster may need it."""
    m.does(JOIN)
    with monkeypatch.context() as patch:
        patch.setattr(Script, "stop", _dies)
        if cut == "halt":
            patch.setattr(Script, "halt", _dies)
        assert m.apply(JOIN_AGENT).outcome is Outcome.FAILED
    m.power_cut()
    assert m.runs(UNIT[SERVER])
    m.does(JOIN_AGENT)
    assert m.runs(UNIT[AGENT])


def test_an_agent_that_has_not_joined_yet_is_not_stopped_for_it(m: Scripted) -> None:
    m.does(JOIN_AGENT)
    said = m.paths.root / "systemd/said"
    said.write_text("")
    m.does(JOIN_AGENT)
    assert "stop" not in said.read_text()
    assert "disable --now" not in said.read_text()
    script = Script(load_config(m.paths), m.paths)
    assert [script.running(role) for role in (None, AGENT, SERVER)] == [True, True, False]


@pytest.mark.parametrize("unit", ["k3s.service", "k3s-shop.service"])
def test_an_adopted_k3s_that_its_owner_disabled_is_started_at_most(m: Scripted, unit: str) -> None:
    m.put(*AS_SERVER, WAL)
    (m.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:{TOKEN}\n")
    m.has(OLD, unit)
    m.systemctl("disable", "--now", unit)
    for order in (PREPARE, JOIN, INIT):
        m.does(order)
    assert m.units == {f"active {unit}"}
    assert m.installs == []
    assert not m.paths.installed.exists()


def test_an_adopted_sqlite_server_of_any_name_converts_and_boots_as_before(
    m: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    m.put(*AS_SERVER, STATE)
    (m.paths.k3s_data / "server/token").write_text(f"K10{HASH}::server:{TOKEN}\n")
    m.has(RELEASE, "k3s-shop.service")
    m.systemctl("disable", "k3s-shop.service")
    monkeypatch.setattr("k3sagentd.k3s.convert.pings", lambda: True)
    m.does(INIT)
    assert (m.paths.k3s_data / "server/db/state.db.migrated").exists()
    assert m.units == {"active k3s-shop.service"}
    said = (m.paths.root / "systemd/said").read_text().splitlines()
    assert "stop k3s-shop.service" in said


def test_an_old_disk_with_sqlite_converts_and_is_enabled(
    m: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    m.put(*AS_SERVER, STATE)
    m.configure(f", version: {RELEASE}")
    monkeypatch.setattr("k3sagentd.k3s.convert.pings", lambda: True)
    m.does(INIT)
    assert (m.paths.k3s_data / "server/db/state.db.migrated").exists()
    assert m.runs(UNIT[SERVER])
    assert not m.paths.restart.exists()


def test_a_new_role_stops_what_runs_in_the_other(m: Scripted) -> None:
    m.does(JOIN)
    m.does(JOIN_AGENT)
    assert m.runs(UNIT[AGENT])


# --- releases -------------------------------------------------------------------------------


def test_an_agent_that_prepares_to_be_a_server_keeps_its_release(m: Scripted) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT)
    m.has(OLD, UNIT[AGENT])
    m.configure(f", version: {NEWEST}")
    m.does(PREPARE)
    assert m.release == OLD
    assert m.runs(UNIT[AGENT])
    assert (m.paths.root / "etc/systemd/system/k3s.service").exists()
    # The join says which: the servers'. Where they do not say, it is the one that it has.
    m.does(replace(JOIN, k3s_version=RELEASE))
    assert m.release == RELEASE
    assert m.runs(UNIT[SERVER])


def test_without_a_word_of_the_servers_an_agent_joins_them_with_what_it_has(m: Scripted) -> None:
    m.put(*AS_AGENT)
    m.ours(AGENT)
    m.has(OLD, UNIT[AGENT])
    m.does(PREPARE)
    m.does(JOIN)
    assert m.release == OLD
    assert m.runs(UNIT[SERVER])


def test_a_late_server_joins_with_the_release_of_the_servers(m: Scripted) -> None:
    m.does(PREPARE)
    m.does(replace(JOIN, k3s_version=RELEASE))
    assert m.release == RELEASE
    # Told anew while it has not joined: another release means another start.
    m.does(replace(JOIN, k3s_version=OLD))
    assert m.release == OLD
    assert m.runs(UNIT[SERVER])
    said = (m.paths.root / "systemd/said").read_text().splitlines()
    assert said[-1] == "restart --no-block k3s.service"
    m.does(replace(JOIN, k3s_version=OLD))
    assert m.installs == ["server"] * 3


def test_before_the_seal_it_is_as_configured(m: Scripted) -> None:
    m.does(INIT)
    assert m.release == NEWEST
    m.configure(f", version: {RELEASE}")
    m.does(INIT)
    assert m.release == RELEASE


def test_a_binary_that_a_cut_left_broken_is_installed_again(m: Scripted) -> None:
    m.does(JOIN)
    (m.paths.root / "usr/local/bin/k3s").write_bytes(b"")
    m.does(JOIN)
    assert m.release == NEWEST
    assert m.runs(UNIT[SERVER])


def test_a_binary_elsewhere_is_installed_too(m: Scripted) -> None:
    """Where /usr/local cannot be written the script takes /opt/bin (K3S.md 6)."""
    m.has(OLD, UNIT[AGENT])
    (m.paths.root / "opt/bin").mkdir(parents=True)
    (m.paths.root / "usr/local/bin/k3s").rename(m.paths.root / "opt/bin/k3s")
    script = Script(load_config(m.paths), m.paths)
    assert script.installed(AGENT)
    script.install(PREPARE)
    assert f"INSTALL_K3S_BIN_DIR={m.paths.root}/opt/bin" in m.asked
    assert not (m.paths.root / "usr/local/bin/k3s").exists()


def test_a_systemctl_that_hangs_is_named(m: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    (m.paths.root / "bin/systemctl").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(install, "SYSTEMCTL_TIMEOUT_S", 0.1)
    with pytest.raises(MachineError, match="systemctl took longer than"):
        Script(load_config(m.paths), Paths(m.paths.root)).running()


# --- method exec ----------------------------------------------------------------------------


def test_a_supervisor_runs_k3s_in_one_role(m: Scripted) -> None:
    binary = m.paths.root / "k3s"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    way = Exec(binary, m.paths)
    roles = (None, AGENT, SERVER)
    assert [way.running(role) for role in roles] == [False, False, False]
    way.start(SERVER)
    assert [way.running(role) for role in roles] == [True, False, True]
    way.stop()
    assert not way.running()
    way.owe_start(SERVER)
    assert not way.owes_start(SERVER), "each order starts it"
