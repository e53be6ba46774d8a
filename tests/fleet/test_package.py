# SPDX-License-Identifier: Apache-2.0
"""The package in a person's hands: installed, configured late, upgraded, removed, purged."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from k3sagentd import provision, site_token
from tests.fleet import base
from tests.fleet.conftest import CONFIG, RELEASES, Fleet
from tests.fleet.machine import Machine

STATE = ("/etc/k3sagentd", "/var/lib/k3sagentd", "/var/lib/k3sagentd-apply", "/run/k3sagentd")
K3S = (
    "/etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml",
    "/etc/rancher/k3s/k3sagentd-token",
    "/var/lib/rancher/k3s/server/db/etcd/member/wal",
)
SLOW = "#!/bin/sh\necho $$ >/run/slow\nexec sleep 3600\n"
"""An install script that takes its time."""
STARTS = """[Service]
ExecStart=sleep infinity
[Install]
WantedBy=multi-user.target
"""
"""In K3s's place."""
ALONE = CONFIG | {
    "nodes": 1,
    # Nobody sets this machine's clock, and it has no peers: it would wait two minutes for them.
    "ignore-preflight": [*CONFIG["ignore-preflight"], "clock"],
}


@pytest.fixture(scope="module", params=RELEASES)
def machine(fleet: Fleet, request: pytest.FixtureRequest) -> Machine:
    """A machine that knows the repository and nothing else, a site of its own."""
    made = fleet.add(request.param, baked=False)
    made.on()
    return made.booted()


def state(machine: Machine, unit: str = "k3sagentd") -> str:
    return machine.run("systemctl", "is-active", unit, check=False).strip()


def sealed(fleet: Fleet, machine: Machine) -> dict:
    def ready(views: dict) -> bool:
        return views.get(machine.name, {}).get("node", {}).get("phase") == "ready"

    return fleet.until(ready)[machine.name]


def test_from_the_repository_to_a_cluster(fleet: Fleet, machine: Machine) -> None:
    machine.run("apt-get", "update", "-q")
    said = machine.run("apt-get", "install", "-q", "-y", "k3sagentd", "k3sagentd-lab")
    assert "unauthenticated" not in said.lower()
    # Without a configuration it waits, says so, and nothing has failed.
    assert state(machine) == "inactive"
    status = machine.run("systemctl", "status", "k3sagentd", check=False)
    assert "/etc/k3sagentd/token* was not met" in status
    said = machine.run("k3sagentd", "status", check=False)
    assert "/etc/k3sagentd/token" in said, said
    machine.assert_healthy()
    # A wrong one is named in one line; mended, it starts by itself.
    machine.put_now("/etc/k3sagentd/config.yaml", "nodes: many\n")
    machine.run("k3sagentd", "token", "create")
    fleet_until(machine, "failed")
    journal = machine.run("journalctl", "-u", "k3sagentd", "--no-pager", "-o", "cat")
    assert "/etc/k3sagentd/config.yaml: nodes is 'many'; allowed: a number from 1 to 99" in journal
    machine.put_now("/etc/k3sagentd/config.yaml", yaml.safe_dump(ALONE))
    fleet_until(machine, "active")
    sealed(fleet, machine)
    assert machine.run("k3sagentd", "wait", "--for", "complete", "--timeout", "30s") == ""
    assert "control-plane" in machine.run("k3s", "kubectl", "get", "nodes")
    machine.assert_healthy()


def test_man_pages_and_completions_are_there(machine: Machine) -> None:
    files = machine.run("dpkg", "-L", "k3sagentd")
    for file in ("man1/k3sagentd.1.gz", "man5/k3sagentd-config.5.gz", "_k3sagentd", ".fish"):
        assert file in files
    assert not [line for line in files.splitlines() if "/lab" in line]


def test_units_are_valid_and_tight(machine: Machine) -> None:
    """Each release knows all keys, and counts the exposure of what faces the network, offline."""
    units = "/usr/lib/systemd/system/k3sagentd"
    assert machine.run("systemd-analyze", "--man=no", "verify", f"{units}.service") == ""
    for other in ("-apply.service", "-provision.service", ".path", "-apply.path"):
        assert machine.run("systemd-analyze", "--man=no", "verify", units + other) == ""
    security = ("systemd-analyze", "security", "--offline=true")
    machine.run(*security, "--threshold=12", f"{units}.service")
    said = machine.run(*security, f"{units}.service").strip().splitlines()[-1]
    print(f"\n{machine.run('systemctl', '--version').split()[1]}: {said}")
    machine.run(*security, "--threshold=15", f"{units}-provision.service")


def test_what_others_may_not_see(machine: Machine) -> None:
    """The facts have DMI's UUID; who may not ask the daemon is told so."""
    other = ("runuser", "-u", "nobody", "--")
    assert "Permission denied" in machine.run(
        *other, "cat", "/run/k3sagentd/facts.json", check=False
    )
    machine.run("runuser", "-u", "k3sagentd", "--", "cat", "/run/k3sagentd/facts.json")
    said = machine.run(*other, "sh", "-c", "k3sagentd status; echo $?", check=False)
    assert "control.sock: permission denied; run it as root" in said
    assert said.endswith("\n77\n")


def test_the_package_knows_its_date(machine: Machine) -> None:
    """What no true clock is behind of; not by a file's own time."""
    look = "from k3sagentd import version; print(version.CHANGELOG.exists(), version.built_s())"
    changelog = ("dpkg-parsechangelog", "--show-field", "Timestamp")
    dated = subprocess.run(changelog, cwd=base.ROOT, check=True, capture_output=True, text=True)
    assert machine.run("python3", "-c", look).split() == ["False", f"{int(dated.stdout)}.0"]


def test_an_upgrade_keeps_state_and_leaves_k3s_alone(fleet: Fleet, machine: Machine) -> None:
    mine = "# mine\n"
    machine.put_now("/etc/k3sagentd/config.yaml.d/README", mine)
    before = sealed(fleet, machine)
    pid = machine.run("systemctl", "show", "-P", "MainPID", "k3s")
    newer(machine, "9.9.9")
    after = sealed(fleet, machine)
    assert "9.9.9" in machine.run("dpkg", "-s", "k3sagentd")
    assert after["node"]["id"] == before["node"]["id"]
    assert after["site"]["ca_hash"] == before["site"]["ca_hash"]
    assert machine.run("systemctl", "show", "-P", "MainPID", "k3s") == pid
    assert machine.run("cat", "/etc/k3sagentd/config.yaml.d/README") == mine
    machine.assert_healthy()


def test_remove_and_purge_leave_k3s_and_its_data(machine: Machine) -> None:
    pid = machine.run("systemctl", "show", "-P", "MainPID", "k3s")
    machine.run("apt-get", "remove", "-q", "-y", "k3sagentd")
    assert state(machine) == "inactive"
    assert state(machine, "k3sagentd-apply.path") == "inactive"
    assert machine.run("ls", "/etc/k3sagentd/token", "/var/lib/k3sagentd/node.key")
    assert machine.run("systemctl", "show", "-P", "MainPID", "k3s") == pid
    machine.run("apt-get", "purge", "-q", "-y", "k3sagentd")
    for path in STATE:
        assert machine.run("ls", "-d", path, check=False).startswith("ls: cannot access"), path
    for path in K3S:
        machine.run("ls", "-d", path)
    assert machine.run("systemctl", "show", "-P", "MainPID", "k3s") == pid
    machine.assert_healthy()


def test_a_card_is_read_at_install_and_remove_stops_roots_part_half_way(fleet: Fleet) -> None:
    """As cloud-init does on a Raspberry Pi: the package comes last."""
    machine = fleet.add(RELEASES[0], baked=False)
    config = ALONE | {"install": {"script": "/root/slow"}}
    machine.put("root/slow", SLOW, 0o755)
    machine.put("boot/firmware/k3sagentd/config.yaml", yaml.safe_dump(config))
    machine.put("boot/firmware/k3sagentd/token", site_token.generate())
    machine.on()
    machine.booted()
    machine.run("sh", "-c", "apt-get update -q && apt-get install -q -y k3sagentd")
    assert machine.run("ls", "/boot/firmware/k3sagentd").split() == ["config.yaml", provision.NOTE]
    machine.run(
        "sh", "-c", "for i in $(seq 300); do [ -s /run/slow ] && exit; sleep 0.2; done; exit 1"
    )
    assert state(machine, "k3sagentd-apply.service") == "activating"
    root_pid = machine.run("cat", "/run/slow").strip()
    machine.run("ls", "-d", f"/proc/{root_pid}")
    for name in ("order.json", "errand.json"):
        machine.put_now(f"/run/k3sagentd/{name}", "{}")
    machine.run("apt-get", "remove", "-q", "-y", "k3sagentd")
    for unit in ("k3sagentd", "k3sagentd-apply.path", "k3sagentd-apply.service"):
        assert state(machine, unit) == "inactive", unit
    assert "cannot access" in machine.run("ls", "-d", f"/proc/{root_pid}", check=False)
    left = machine.run("ls", "/run/k3sagentd").split()
    assert not {"order.json", "errand.json"} & {*left}
    machine.assert_healthy()


@pytest.mark.parametrize("release", RELEASES)
def test_at_boot_k3s_starts_after_the_daemon_and_without_it(fleet: Fleet, release: str) -> None:
    machine = fleet.add(release)
    fleet.configure(machine)
    units = machine.disk / "etc/systemd/system"
    for unit in ("k3s.service", "k3s-agent.service", "k3s-shop.service"):
        machine.put(f"etc/systemd/system/{unit}", STARTS)
        wanted = units / "multi-user.target.wants" / unit
        wanted.parent.mkdir(exist_ok=True)
        wanted.symlink_to(f"/etc/systemd/system/{unit}")
    (units / "k3sagentd.service").symlink_to("/dev/null")
    machine.on()
    machine.booted()
    assert machine.run("systemctl", "show", "-P", "LoadState", "k3sagentd").strip() == "masked"
    for unit in ("k3s", "k3s-agent", "k3s-shop"):
        assert state(machine, unit) == "active", unit
    machine.assert_healthy()
    machine.cut()
    (units / "k3sagentd.service").unlink()
    machine.on()
    machine.booted()
    ready = ("systemctl", "show", "-P", "ActiveEnterTimestampMonotonic")
    began = ("systemctl", "show", "-P", "InactiveExitTimestampMonotonic")
    for unit in ("k3s", "k3s-agent", "k3s-shop"):
        assert state(machine, unit) == "active", unit
        assert 0 < int(machine.run(*ready, "k3sagentd")) <= int(machine.run(*began, unit))
    machine.assert_healthy()


def fleet_until(machine: Machine, wanted: str) -> None:
    """Wait for the daemon's unit."""
    script = f"for i in $(seq 100); do [ $(systemctl is-active k3sagentd) = {wanted} ] && exit 0"
    machine.run("sh", "-c", f"{script}; sleep 0.2; done; systemctl status k3sagentd; exit 1")


def newer(machine: Machine, version: str) -> None:
    """Install the same packages with a higher version."""
    work = base.ROOT / "build/newer"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for deb in sorted((base.ROOT / "build/deb").glob("*.deb")):
        tree = work / deb.stem
        subprocess.run(["dpkg-deb", "-R", deb, tree], check=True)
        control = tree / "DEBIAN/control"
        old = next(
            line.split()[1] for line in control.read_text().splitlines() if line[:8] == "Version:"
        )
        control.write_text(control.read_text().replace(old, version))
        name = f"{deb.name.split('_')[0]}_{version}_all.deb"
        subprocess.run(["dpkg-deb", "-b", tree, work / name], check=True, capture_output=True)
        machine.put_now(f"/tmp/{name}", Path(work / name).read_bytes())
    machine.run("sh", "-c", f"apt-get install -q -y /tmp/*_{version}_all.deb")


@pytest.mark.parametrize("release", RELEASES)
def test_autopkgtests(fleet: Fleet, release: str) -> None:
    """As autopkgtest runs them: in the source tree, on a machine that has the packages."""
    machine = fleet.add(release)
    machine.on()
    machine.booted()
    for directory in ("debian/tests", "tests/fleet/site"):
        for file in (base.ROOT / directory).iterdir():
            mode = file.stat().st_mode & 0o777
            machine.put_now(f"/root/source/{directory}/{file.name}", file.read_bytes(), mode)
    control = (base.ROOT / "debian/tests/control").read_text()
    names = [line.split()[1] for line in control.splitlines() if line.startswith("Tests:")]
    assert names
    for name in names:
        machine.run("sh", "-c", f"cd /root/source && debian/tests/{name}")
    machine.assert_healthy()
