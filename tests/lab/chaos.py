# SPDX-License-Identifier: Apache-2.0
"""``make chaos MINUTES=10 SEED=…``: real daemons, real etcd, and a wire and a power that are not to
be relied on; then all is mended, and there must be one cluster.

Machines are switched on into the middle of it. What happens is drawn from the seed; when exactly it
meets the daemons is not, so that a seed is a weather and not a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from k3sagentd.errors import K3sagentdError
from k3sagentd.lab import network, site

NODES = 5
SETTLE_S = 300.0
"""How long the site may take once all is mended."""
PAUSE_S = (0.5, 4.0)
"""Between two happenings."""
HASTE_S, YOUNG_S = (0.1, 1.0), 30.0
"""The same while the site is young: it elects and seals within seconds."""
LAB = [sys.executable, "-m", "k3sagentd", "lab"]
OPTIONS = ("--stand-in", "promote_s=2", "--set", "settle=1s", "--set", "abandon-after=20s")
ETCDCTL = ("env", "ETCDCTL_API=3", "etcdctl", "-w", "json")


class Chaos:
    """One storm over one lab."""

    def __init__(self, lab: site.Lab, seed: int) -> None:
        self._lab = lab
        self._chance = random.Random(seed)
        self._stopped: dict[str, list[int]] = {}
        self.happened: Counter[str] = Counter()
        self.data: dict[tuple[str, int], str] = {}
        """Each K3s data directory ever seen, by machine and inode, with the path it had."""

    def storm(self, seconds: float) -> None:
        """Let things happen."""
        began = time.monotonic()
        end = began + seconds
        names = list(self._lab.machines)
        kinds = (
            *(self._power,) * 4,
            *(self._cut,) * 3,
            *(self._one_way,) * 2,
            *(self._loss,) * 2,
            *(self._mend,) * 3,
            *(self._kill_daemon,) * 2,
            self._stop_daemon,
            self._stop_machine,
            *(self._continue,) * 2,
            self._second_daemon,
            self._second_apply,
        )
        while time.monotonic() < end:
            with contextlib.suppress(K3sagentdError, ProcessLookupError):
                self._chance.choice(kinds)(self._chance.choice(names))
            self.look()
            young = time.monotonic() < began + YOUNG_S
            time.sleep(self._chance.uniform(*(HASTE_S if young else PAUSE_S)))

    def mend(self) -> None:
        """The storm is over."""
        for name in list(self._stopped):
            self._continue(name)
        _rules("")
        for name in self._lab.machines:
            if self._lab.pid(name) is None:
                self._lab.start(name)
        self.look()

    def look(self) -> None:
        """Note which K3s data there is: none of it may ever be gone."""
        for name in self._lab.machines:
            rancher = self._lab.machine(name) / "var/lib/rancher"
            for etcd in rancher.glob("k3s*/server/db/etcd"):
                with contextlib.suppress(FileNotFoundError):
                    self.data.setdefault((name, etcd.stat().st_ino), str(etcd))

    def lost(self) -> list[str]:
        """Data that was seen and is nowhere now."""
        now = set()
        for name in self._lab.machines:
            rancher = self._lab.machine(name) / "var/lib/rancher"
            now |= {(name, e.stat().st_ino) for e in rancher.glob("k3s*/server/db/etcd")}
        return [path for key, path in self.data.items() if key not in now]

    # --- what happens -----------------------------------------------------------------------

    def _count(self, what: str) -> None:
        self.happened[what] += 1

    def _power(self, name: str) -> None:
        if self._lab.pid(name) is None:
            self._lab.start(name)
            self._count("power on")
        else:
            self._stopped.pop(name, None)
            self._lab.kill(name)
            self._count("power cut")

    def _cut(self, name: str) -> None:
        names = list(self._lab.machines)
        side = set(self._chance.sample(names, self._chance.randint(1, len(names) - 1)))
        ours, theirs = ", ".join(sorted(side)), ", ".join(sorted(set(names) - side))
        _rules(
            f"iifname {{ {ours} }} oifname {{ {theirs} }} drop\n"
            f"iifname {{ {theirs} }} oifname {{ {ours} }} drop\n"
        )
        self._count("partition")

    def _one_way(self, name: str) -> None:
        others = [other for other in self._lab.machines if other != name]
        deaf = ", ".join(self._chance.sample(others, self._chance.randint(1, len(others))))
        _rules(f"iifname {{ {deaf} }} oifname {{ {name} }} drop\n")
        self._count("partition one way")

    def _loss(self, name: str) -> None:
        _rules(f"numgen random mod 100 < {self._chance.choice((5, 20, 40))} drop\n")
        self._count("packet loss")

    def _mend(self, name: str) -> None:
        _rules("")

    def _kill_daemon(self, name: str) -> None:
        for pid in self._processes(name, "run"):
            os.kill(pid, signal.SIGKILL)
            self._count("daemon killed")

    def _stop_daemon(self, name: str) -> None:
        self._stop(name, self._processes(name, "run"))
        self._count("daemon stopped")

    def _stop_machine(self, name: str) -> None:
        self._stop(name, self._processes(name))
        self._count("machine stopped")

    def _stop(self, name: str, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._stopped.setdefault(name, []).extend(pids)

    def _continue(self, name: str) -> None:
        for pid in self._stopped.pop(name, []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _second_daemon(self, name: str) -> None:
        self._twice(name, "run")
        self._count("daemon started twice")

    def _second_apply(self, name: str) -> None:
        self._twice(name, "apply")
        self._count("apply started twice")

    def _twice(self, name: str, what: str) -> None:
        command = self._lab.command_in(name, [sys.executable, "-m", "k3sagentd", what])
        with (self._lab.machine(name) / f"var/log/second-{what}.log").open("a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            process.kill()
            process.wait()

    def _processes(self, name: str, what: str | None = None) -> list[int]:
        """Processes of a machine, by its PID namespace; ``what`` is the command of ours."""
        first = self._lab.pid(name)
        if first is None:
            return []
        home = Path(f"/proc/{first}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/pid").readlink() == home:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if what is None or words[1:4] == [b"-m", b"k3sagentd", what.encode()]:
                        found.append(int(entry.name))
        return found


def _rules(body: str) -> None:
    """Replace what the switch does to frames."""
    ruleset = (
        "table bridge chaos\ndelete table bridge chaos\ntable bridge chaos {\n chain forward {\n"
        f"  type filter hook forward priority 0;\n{body} }}\n}}\n"
    )
    network.run("ip", "netns", "exec", network.SWITCH, "nft", "-f", "-", stdin=ruleset)


def views() -> dict[str, dict]:
    """Every machine's own view."""
    done = subprocess.run(
        [*LAB, "status", "--json"], capture_output=True, text=True, check=False, timeout=60
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


def complete(found: dict[str, dict]) -> bool:
    """Every machine is ready in a sealed site."""
    return len(found) == NODES and all(
        "error" not in v and v["site"]["phase"] == "sealed" and v["node"]["phase"] == "ready"
        for v in found.values()
    )


def members(lab: site.Lab, name: str) -> dict:
    """What etcd on a server says of its cluster."""
    done = subprocess.run(
        lab.command_in(name, [*ETCDCTL, "member", "list"]),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return json.loads(done.stdout)


def healthy(lab: site.Lab, found: dict[str, dict]) -> bool:
    """Whether etcd answers on each server: its daemon's word may be a minute old."""
    health = ["env", "ETCDCTL_API=3", "etcdctl", "endpoint", "health"]
    asked = [
        subprocess.run(lab.command_in(name, health), capture_output=True, check=False, timeout=30)
        for name, view in found.items()
        if view["node"]["role"] == "server"
    ]
    return not any(each.returncode for each in asked)


def judge(lab: site.Lab, chaos: Chaos) -> str:
    """One cluster, all of its members in it, nothing of K3s deleted; raises AssertionError."""
    found = views()
    servers = [name for name, v in found.items() if v["node"]["role"] == "server"]
    lists = [members(lab, name) for name in servers]
    ids = {each["header"]["cluster_id"] for each in lists}
    assert len(ids) == 1, f"{len(ids)} etcd clusters"
    for each in lists:
        names = [m.get("name") for m in each["members"]]
        assert all(names), f"a member was never started: {each['members']}"
        learners = [m["name"] for m in each["members"] if m.get("isLearner")]
        assert not learners, f"still learners: {learners}"
        assert len(names) == len(servers), f"{len(names)} members, {len(servers)} servers"
    assert len({v["site"]["ca_hash"] for v in found.values()}) == 1, "they name several CAs"
    assert not chaos.lost(), f"K3s data is gone: {chaos.lost()}"
    epoch = next(iter(found.values()))["site"]["epoch"]
    return f"one etcd cluster, {len(servers)} members, epoch {epoch}, {len(chaos.data)} data dirs"


def waits(found: dict[str, dict]) -> str:
    """What each machine waits for, for a failure."""
    return "\n".join(
        f"{name}: {v.get('error') or (v['node']['phase'], v['node']['waiting_for'])}"
        for name, v in found.items()
    )


def run(minutes: float, seed: int) -> str:
    """A storm, then the judgement; raises AssertionError. The caller takes the lab down."""
    subprocess.run(
        [*LAB, "up", "--nodes", str(NODES), *OPTIONS], check=True, stdout=subprocess.DEVNULL
    )
    lab = site.load()
    chaos = Chaos(lab, seed)
    chaos.storm(minutes * 60)
    chaos.mend()
    end = time.monotonic() + SETTLE_S
    while not (complete(found := views()) and healthy(lab, found)):
        assert time.monotonic() < end, (
            f"not complete {SETTLE_S:.0f} s after all was mended\n{waits(found)}"
        )
        chaos.look()
        time.sleep(1)
    took_s = SETTLE_S - (end - time.monotonic())
    verdict = judge(lab, chaos)
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.happened.items()))
    return f"{verdict}; complete {took_s:.0f} s after: {what}"


def main() -> int:
    """Exit code 1 where the promise broke."""
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"{arguments.minutes:.0f} minutes, seed {arguments.seed}", flush=True)
    site.down()
    try:
        print(run(arguments.minutes, arguments.seed))
    except AssertionError as error:
        print(f"BROKEN: {error}")
        return 1
    finally:
        site.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
