# SPDX-License-Identifier: Apache-2.0
"""Power on, walk away: five machines of an image, from power-on to complete, and the dark after."""

import random
import re
import shutil
import subprocess
import time

import pytest
import yaml

from tests.fleet.conftest import CONFIG, RELEASES, Fleet

PRIVATE = (
    "/etc/k3sagentd/token",
    "/etc/rancher/k3s/k3sagentd-token",
    "/var/lib/rancher/k3s/server/",  # K3s's own
    "/run/credentials/",
    "/run/host/credentials/",
)
"""Where the token may stand."""


@pytest.fixture(scope="module")
def site(fleet: Fleet) -> Fleet:
    """Five machines, given configuration and token in each of the three ways, and powered on."""
    for number in range(5):
        fleet.add(RELEASES[0 if number < 3 else -1])
    config = yaml.safe_dump(CONFIG)
    one, two, three, four, five = fleet.machines
    for machine in (one, two):
        machine.credentials = {"k3sagentd.token": fleet.token, "k3sagentd.config": config}
    for machine, partition in ((three, "boot/firmware"), (four, "boot")):
        machine.put(f"{partition}/k3sagentd/config.yaml", config)
        machine.put(f"{partition}/k3sagentd/token", fleet.token + "\r\n")
    fleet.configure(five)
    start_s = time.monotonic()
    for machine in fleet.machines:
        machine.on()
    steps = {}

    def step(name: str, done: bool) -> bool:
        if done:
            steps.setdefault(name, time.monotonic() - start_s)
        return done

    def complete(views: dict[str, dict]) -> bool:
        phases = [view["site"]["phase"] for view in views.values()]
        step("all five answer", len(views) == 5)
        step("nominated", "nominated" in phases or "sealed" in phases)
        step("sealed", "sealed" in phases)
        ready = [view["node"]["phase"] == "ready" for view in views.values()]
        return step("complete", len(ready) == 5 and all(ready))

    fleet.until(complete)
    print(f"\npower-on to complete, {RELEASES[0]} and {RELEASES[-1]}:")
    for name, at_s in steps.items():
        print(f"  {at_s:5.1f} s  {name}")
    return fleet


def test_one_cluster_of_five(site: Fleet) -> None:
    views = site.views()
    for key in ("id", "epoch", "init_node", "ca_hash"):
        assert len({str(view["site"][key]) for view in views.values()}) == 1, key
    server = next(m for m in site.machines if views[m.name]["node"]["role"] == "server")
    get = ("k3s", "kubectl", "get", "nodes")
    site.until(lambda _: len(server.run(*get, check=False).splitlines()[1:]) == 5)
    nodes = server.run(*get).splitlines()[1:]
    assert len([line for line in nodes if "control-plane" in line]) == 3


def test_systemd_tells_the_story(site: Fleet) -> None:
    for machine in site.machines:
        machine.assert_healthy()
        machine.assert_starts_at_boot(site.views()[machine.name]["node"]["role"])
        status = machine.run("systemctl", "status", "k3sagentd")
        assert 'Status: "ready"' in status, status
        assert machine.run("systemctl", "show", "-P", "User", "k3sagentd").strip() == "k3sagentd"


def test_the_sandbox_is_as_tight_live(site: Fleet) -> None:
    for machine in site.machines:
        last = machine.run("systemd-analyze", "security", "k3sagentd").strip().splitlines()[-1]
        found = re.search(r"(\d+\.\d+)", last)
        assert found is not None, last
        assert float(found[1]) <= 1.2, last


def test_the_token_of_a_card_is_wiped_and_a_note_is_left(site: Fleet) -> None:
    for number, partition in ((2, "boot/firmware"), (3, "boot")):
        machine = site.machines[number]
        directory = f"/{partition}/k3sagentd"
        assert machine.run("ls", directory).split() == ["config.yaml", "k3sagentd-was-here.txt"]
        note = machine.run("cat", f"{directory}/k3sagentd-was-here.txt")
        assert "was overwritten and removed" in note
        assert site.token not in note
        assert machine.run("stat", "-c", "%a %U", "/etc/k3sagentd/token").split() == ["600", "root"]


def test_the_token_is_nowhere_else(site: Fleet) -> None:
    """Files, command lines, environments, journals: only root's own files have it."""
    look = (
        "import os, pathlib, sys\n"
        "token, found = sys.stdin.buffer.read().strip(), []\n"
        "for top in ('/etc', '/run', '/var', '/tmp', '/boot', '/root', '/usr/local', '/home'):\n"
        "    for at, _, names in os.walk(top):\n"
        "        for name in names:\n"
        "            path = pathlib.Path(at, name)\n"
        "            if path.is_symlink() or not path.is_file(): continue\n"
        "            if token in path.read_bytes(): found.append(str(path))\n"
        "for kind in ('cmdline', 'environ'):\n"
        "    for path in pathlib.Path('/proc').glob(f'[0-9]*/{kind}'):\n"
        "        try:\n"
        "            if token in path.read_bytes(): found.append(str(path))\n"
        "        except OSError: pass\n"
        "print(*found, sep='\\n')\n"
    )
    for machine in site.machines:
        machine.put_now("/root/token-to-find", site.token, 0o600)
        script = f"python3 -c {_quote(look)} < /root/token-to-find"
        found = machine.run("sh", "-c", script).split()
        assert "/etc/k3sagentd/token" in found, "the search finds nothing at all"
        for path in set(found) - {"/root/token-to-find"}:
            closed = machine.run("runuser", "-u", "nobody", "--", "cat", path, check=False)
            assert site.token not in closed, (machine.name, path)
            assert path.startswith(PRIVATE), (machine.name, path)
        journal = machine.run("journalctl", "-b", "--no-pager", "-o", "json", "--all")
        assert site.token not in journal
        assert "k3sagentd" in journal


def test_k3s_goes_on_without_the_daemon_and_by_hand(site: Fleet) -> None:
    role = site.complete()["m1"]["node"]["role"]
    machine, unit = site.machines[0], "k3s" if role == "server" else "k3s-agent"
    before = machine.run("systemctl", "show", "-P", "MainPID", unit)
    machine.run("systemctl", "restart", "k3sagentd")
    site.complete()
    assert machine.run("systemctl", "show", "-P", "MainPID", unit) == before
    machine.run("systemctl", "restart", unit)
    site.complete()
    assert machine.run("systemctl", "show", "-P", "MainPID", unit) != before
    assert "k3sagentd.service" in machine.run("systemctl", "show", "-P", "After", unit)


def test_all_five_in_the_dark_at_once(site: Fleet) -> None:
    """The same cluster, without an election."""
    before = site.complete()
    for machine in site.machines:
        machine.cut()
    again = random.Random(4).sample(site.machines, 5)
    for machine in again:
        machine.on()
        time.sleep(0.5)
    start_s = time.monotonic()
    after = site.complete()
    print(f"\nall five off and on: the same cluster after {time.monotonic() - start_s:.1f} s")
    for name, view in after.items():
        for key in ("id", "epoch", "init_node", "ca_hash"):
            assert view["site"][key] == before[name]["site"][key]
        assert view["node"]["id"] == before[name]["node"]["id"]
        assert not [event for event in view.get("events", []) if "electing" in event["text"]]
    for machine in site.machines:
        journal = machine.booted().run("journalctl", "-b", "-u", "k3sagentd", "--no-pager")
        assert "electing" not in journal
        machine.assert_healthy()
        machine.assert_starts_at_boot(after[machine.name]["node"]["role"])


def test_a_late_machine_installs_from_the_repository_and_joins(site: Fleet) -> None:
    cluster = site.complete()["m1"]["site"]
    late = site.add(RELEASES[-1], baked=False)
    late.on()
    late.booted().run("apt-get", "update", "-q")
    late.run("apt-get", "install", "-q", "-y", "k3sagentd", "k3sagentd-lab")
    late.put_now("/etc/k3sagentd/config.yaml", yaml.safe_dump(CONFIG))
    late.put_now("/etc/k3sagentd/token", site.token + "\n", 0o600)
    view = site.complete(6)[late.name]
    assert view["node"]["role"] == "agent"
    assert view["site"]["ca_hash"] == cluster["ca_hash"]
    names = {row["name"] for row in view["nodes"]}
    assert len(names) == 6, "every machine is called raspberrypi, but no two nodes of K3s"
    late.assert_healthy()


def test_a_cloned_card_is_a_machine_of_its_own(site: Fleet) -> None:
    """Its card has all that the first machine keeps, its votes and its machine-id included."""
    first, clone = site.machines[0], site.add(RELEASES[0])
    before = site.complete(6)[first.name]
    for path in ("etc/machine-id", "etc/k3sagentd", "var/lib/k3sagentd"):
        source, copy = first.disk / path, clone.disk / path
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    subprocess.run(["chown", "-R", "--reference", first.disk / "var/lib/k3sagentd",
                    clone.disk / "var/lib/k3sagentd"], check=True)  # fmt: skip
    clone.on()
    view = site.complete(7)[clone.name]
    assert view["node"]["id"] != before["node"]["id"]
    journal = clone.run("journalctl", "-u", "k3sagentd", "--no-pager", "-o", "cat")
    assert "the card was moved here from another machine" in journal
    assert "has this machine's machine-id: the card was copied after its" in journal
    assert "machine-id" in clone.run("k3sagentd", "status")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
