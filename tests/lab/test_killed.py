# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at each file that ``apply`` puts in place or removes, and the order given again."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k3sagentd.core.k3s import Action, Order, Outcome, ServerOrAgent
from k3sagentd.k3s import data
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.lab import network, site
from k3sagentd.paths import Paths
from tests.lab.conftest import FAST, ROOT, Bench

APPLY = (
    "import sys; from pathlib import Path; from k3sagentd.k3s.apply import apply; "
    "from k3sagentd.paths import Paths; sys.exit(apply(Paths(Path(sys.argv[1]))))"
)
CALLS = "rename,renameat,renameat2,unlink,unlinkat"
"""What a step does to files ends with one of these, its report of itself included."""
SYSTEMCTL = """#!/bin/sh
cd {root}
active=$(cat active)
for unit; do :; done
case "$1" in
is-active)
    shift
    for each; do [ "$each" = "$active" ] && echo active || echo inactive; done ;;
start|restart)
    [ "$1 $unit" != "start $active" ] || exit 0
    echo "$1" >> starts
    echo "$unit" > active
    case "$unit" in
    k3s.service)
        cd var/lib/rancher/k3s || mkdir -p var/lib/rancher/k3s && cd var/lib/rancher/k3s
        mkdir -p server/db/etcd/member/wal
        [ ! -e server/db/state.db ] || mv server/db/state.db server/db/state.db.migrated ;;
    *) mkdir -p var/lib/rancher/k3s/agent && touch var/lib/rancher/k3s/agent/client-kubelet.crt ;;
    esac ;;
enable) echo "$unit" > enabled ;;
disable)
    [ "$unit" != "$(cat enabled)" ] || : > enabled
    [ "$2 $unit" != "--now $active" ] || : > active ;;
stop) [ "$unit" != "$active" ] || : > active ;;
esac
"""
K3S = "#!/bin/sh\necho k3s version v1.33.4+k3s1\n"
INSTALL = """#!/bin/sh
mkdir -p {root}/etc/systemd/system
[ "$1" = server ] && unit=k3s.service || unit=k3s-agent.service
systemctl disable "$unit"
rm -f "{root}/etc/systemd/system/$unit"
echo '[Service]' > "{root}/etc/systemd/system/$unit"
"""
INIT = Order(action=Action.INIT, epoch=0, role=ServerOrAgent.SERVER, node_name="n1", node="ab" * 8)
STAND_DOWN = replace(INIT, action=Action.STAND_DOWN, epoch=2)
CASES = ["init", "join", "stand-down", "promote", "demote", "convert", "follow"]
UNITS = {
    "init": "k3s.service\n",
    "join": "k3s-agent.service\n",
    "promote": "k3s.service\n",
    "demote": "k3s-agent.service\n",
    "follow": "k3s-agent.service\n",
}
"""What runs and starts at boot in the end. What is stood down does neither, and of what is adopted
and only converts the boot is its owner's."""
ETCD, AGENT = "server/db/etcd/member/wal", "agent/client-kubelet.crt"


class Machine:
    """A root directory with a systemctl and an install script, on the lab's wire."""

    def __init__(self, root: Path, case: str, order: Order, ca: bytes) -> None:
        self.paths = Paths(root)
        self._order = order
        self._ca = ca
        paths = self.paths
        for each in (paths.config.parent, paths.run, paths.dropin.parent, paths.k3s_data):
            each.mkdir(parents=True)
        paths.token.write_text(site.load().token)
        paths.token.chmod(0o600)
        (root / "install.sh").write_text(INSTALL.format(root=root))
        paths.config.write_text(
            f"nodes: 3\nignore-preflight: [clock, cgroup, memory, disk, ports]\n"
            f"install:\n  script: {root}/install.sh\n"
        )
        (root / "bin").mkdir()
        (root / "bin/systemctl").write_text(SYSTEMCTL.replace("{root}", str(root)))
        (root / "bin/systemctl").chmod(0o755)
        for name in ("starts", "active", "enabled"):
            (root / name).touch()
        (root / "usr/local/bin").mkdir(parents=True)
        for name in ("bin/k3s", "usr/local/bin/k3s"):
            (root / name).write_text(K3S)
            (root / name).chmod(0o755)
        match case:
            case "stand-down" | "demote":
                self._runs("server/tls/server-ca.crt", "agent/server-ca.crt", AGENT)
                (paths.k3s_data / ETCD).mkdir(parents=True)
                if case == "stand-down":
                    paths.dropin.write_text("cluster-init: true\n")
                marker = json.dumps({"epoch": order.epoch, "node": order.node})
                (paths.k3s_data / data.MARKER).write_text(marker)
            case "promote" | "follow":
                self._runs("agent/server-ca.crt", AGENT, "agent/images/all.tar")
            case "convert":
                self._put("server/tls/server-ca.crt", "server/db/state.db")
                (root / "etc/systemd/system").mkdir(parents=True)
                (root / "etc/systemd/system/k3s.service").write_text("[Service]\n")

    def _put(self, *names: str) -> None:
        for name in names:
            file = self.paths.k3s_data / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self._ca)

    def _runs(self, *names: str) -> None:
        """It is a member that an order of ours has started."""
        paths = self.paths
        self._put(*names)
        paths.installed.parent.mkdir(parents=True)
        paths.installed.touch()
        paths.dropin.write_text("server: https://127.0.0.1:1\n")
        (paths.root / "etc/systemd/system").mkdir(parents=True)
        for name in ("k3s.service", "k3s-agent.service"):
            (paths.root / "etc/systemd/system" / name).write_text("[Service]\n")
        server = (paths.k3s_data / "server").exists()
        for name in ("active", "enabled"):
            unit = "k3s.service" if server else "k3s-agent.service"
            (paths.root / name).write_text(f"{unit}\n")

    def apply(self, kill_at: int | None = None) -> int:
        """Give the order and carry it out; with ``kill_at`` until that call."""
        write_order(self.paths, self._order)
        command = [sys.executable, "-c", APPLY, str(self.paths.root)]
        if kill_at is not None:
            inject = f"inject={CALLS}:signal=KILL:when={kill_at}"
            trace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS}", "-e", inject]
            command = [*trace, *command]
        # In the mount namespace that ``ip netns exec`` makes, so that it goes with the process.
        ours = f"mount --bind {self.paths.root}/bin /usr/local/sbin"
        done = subprocess.run(
            [
                *("ip", "netns", "exec", network.namespace("node2")),
                *("sh", "-c", f'{ours} && exec "$@"', "sh", *command),
            ],
            # What a killed process had under way there goes with the test.
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.paths.root.parent)},
            cwd="/",
            capture_output=True,
            check=False,
            timeout=60,
        )
        return done.returncode

    def there(self) -> dict[str, tuple[str, int, int]]:
        """Each file of K3s, with its content, its inode and its time."""
        found = {}
        for top in ("etc/rancher", "var/lib/rancher"):
            for path in sorted((self.paths.root / top).rglob("*")):
                status = path.stat()
                text = path.read_text() if path.is_file() else "directory"
                name = str(path.relative_to(self.paths.root))
                changed = 0 if path.is_dir() else status.st_mtime_ns
                found[name] = (text.replace(str(self.paths.root), ""), status.st_ino, changed)
        return found

    def contents(self) -> dict[str, str]:
        """The files alone."""
        return {name: text for name, (text, _, _) in self.there().items()}

    @property
    def systemd(self) -> tuple[str, ...]:
        """Which unit of K3s's runs, and which starts at boot."""
        return tuple((self.paths.root / name).read_text() for name in ("active", "enabled"))

    @property
    def starts(self) -> list[str]:
        """How K3s was started."""
        return (self.paths.root / "starts").read_text().split()


@pytest.fixture(scope="module")
def ca() -> Iterator[bytes]:
    """A site of one server to join, and a cable for the machine that is killed."""
    site.down()
    lab = Bench()
    lab.run("up", "--nodes", "1", "--wait", "complete", *FAST)
    site.load().add()
    server = site.load().machine("node1") / "var/lib/rancher/k3s/server"
    yield (server / "tls/server-ca.crt").read_bytes()
    site.down()


def order_of(case: str, ca: bytes) -> Order:
    if case in ("init", "convert"):
        return INIT
    if case == "stand-down":
        return STAND_DOWN
    return Order(
        action=Action.JOIN,
        epoch=0,
        role=ServerOrAgent.SERVER if case == "promote" else ServerOrAgent.AGENT,
        node_name="n2",
        servers=(f"https://{network.address_of(1)}:6443",),
        ca_hash=hashlib.sha256(ca).hexdigest(),
    )


@pytest.mark.parametrize("case", CASES)
def test_apply_is_killed_at_each_step_and_then_finishes(
    ca: bytes, case: str, tmp_path: Path
) -> None:
    order = order_of(case, ca)
    whole = Machine(tmp_path / "whole", case, order, ca)
    assert whole.apply() == 0, read_result(whole.paths)
    expected = whole.contents()
    check(case, expected)
    runs = "k3s.service\n" if case == "convert" else UNITS.get(case, "")
    assert whole.systemd == (runs, UNITS.get(case, ""))
    killed = 0
    while True:
        m = Machine(tmp_path / f"killed-{killed + 1}", case, order, ca)
        if m.apply(kill_at=killed + 1) == 0:
            break
        killed += 1
        assert m.apply() == 0, f"killed at {killed}: {read_result(m.paths)}"
        result = read_result(m.paths)
        assert result is not None
        assert result.outcome is Outcome.DONE
        assert m.contents() == expected, f"killed at {killed}"
        assert m.systemd == whole.systemd, f"killed at {killed}"
        # An agent that was killed after its restart, before that was noted, is restarted again.
        known = (whole.starts, ["restart", "restart"]) if case == "follow" else (whole.starts,)
        assert m.starts in known, f"killed at {killed}: K3s was started {m.starts}"
        starts = m.starts
        before = m.there()
        assert m.apply() == 0
        assert m.there() == before, f"killed at {killed}: a third run changed something"
        assert m.starts == starts
    assert killed >= 5, "the kill did not hit"


def check(case: str, found: dict[str, str]) -> None:
    """What a run that nobody kills leaves behind."""
    there = {name.removeprefix("var/lib/rancher/k3s/") for name in found}
    match case:
        case "promote":
            assert {ETCD, "agent/images/all.tar", f"agent.before-server/{AGENT[6:]}"} <= there
            assert not {AGENT, "agent.before-server/images", "agent-images"} & there
        case "demote":
            aside = "server.before-agent"
            assert {AGENT, f"{aside}/db/etcd/member/wal", f"{aside}/{data.MARKER}"} <= there
            assert not {"server", data.MARKER} & there
        case "convert":
            assert {ETCD, "server/db/state.db.migrated"} <= there
            assert found["etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml"].endswith(
                "\ncluster-init: true\n"
            )
            assert not [name for name in found if name.endswith("k3sagentd-token")]
