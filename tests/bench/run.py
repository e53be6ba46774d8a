# SPDX-License-Identifier: Apache-2.0
"""``make bench``: speed of the election, memory and idle cost, into build/bench.json."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from k3sagentd.lab import network, site
from k3sagentd.lab.progress import Progress
from k3sagentd.lab.site import Lab

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "import asyncio, ssl, json, aiohttp.web, zeroconf.asyncio, cryptography.x509, yaml, "
    "systemd.daemon, systemd.journal, cryptography.hazmat.primitives.asymmetric.ed25519, "
    "cryptography.hazmat.primitives.kdf.scrypt, cryptography.hazmat.primitives.kdf.hkdf, time; "
    "print('up', flush=True); time.sleep(60)"
)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def row(
    name: str, n: int, value: float, unit: str, reference: float, target: float, *, ratio: bool
) -> dict:
    """One figure; ``target`` bounds the ratio, or the value itself."""
    share = value / reference if reference else 0.0
    measured = share if ratio else value
    return {
        "name": name,
        "n": n,
        "value": round(value, 4),
        "unit": unit,
        "reference": round(reference, 4),
        "ratio": round(share, 3),
        "target": target,
        "ok": measured <= target,
    }


def make(nodes: int) -> Lab:
    """A lab whose machines are plugged in but off; K3s never starts in it."""
    lab = Lab(nodes=nodes, token="", settings={"install": {"method": "exec"}})
    site.create(lab, owned=True)
    for _ in range(nodes):
        name = lab.add()
        (lab.machine(name) / "usr/local/bin/k3s").write_text("#!/bin/sh\nexec sleep 1000000\n")
    return lab


def bare(lab: Lab) -> float:
    """Seconds from the start of the last bare zeroconf until the last one saw all.

    Started one after the other, each when the one before is up, as the lab powers machines on.
    """
    processes, last = [], 0.0
    for name, number in lab.machines.items():
        enter = ["ip", "netns", "exec", network.namespace(name), sys.executable, "-m"]
        arguments = ["tests.bench.bare", network.address_of(number), str(lab.nodes)]
        last = time.time()
        process = subprocess.Popen(
            [*enter, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        processes.append(process)
    return max(float(each.communicate(timeout=60)[0]) for each in processes) - last


def election(lab: Lab) -> float:
    """Seconds from the start of the last daemon to ``nominated`` on all."""
    for name in lab.machines:
        lab.start(name)
    progress = Progress(lab, lambda text: None)
    if not asyncio.run(progress.until("nominated", 60)):
        raise SystemExit("the site was not nominated within 60 s")
    return progress.timings_s["nominated"]


def daemons(lab: Lab) -> list[int]:
    """The daemons' pids, as seen from here."""
    found = []
    for name in lab.machines:
        children = Path(f"/proc/{lab.pid(name)}/task/{lab.pid(name)}/children").read_text().split()
        found += [int(c) for c in children if b"\0run\0" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return found


def resident_mib(pid: int) -> float:
    """VmRSS."""
    status = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1]
    return int(status.split()[0]) / 1024


def reference_mib() -> float:
    """A bare interpreter with the same libraries imported."""
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    value = resident_mib(process.pid)
    process.kill()
    process.wait()
    return value


def cost(pids: list[int]) -> tuple[float, int]:
    """CPU seconds and bytes written, of all daemons together."""
    cpu = written = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu += int(fields[11]) + int(fields[12])
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        written += int(io["write_bytes"])
    return cpu / TICKS_PER_S, written


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--idle-seconds", type=int, default=300)
    idle_s = parser.parse_args().idle_seconds
    rows = []
    for nodes in (3, 5, 10):
        lab = make(nodes)
        try:
            reference = bare(lab)
            rows.append(row("nominated", nodes, election(lab), "s", reference, 1.5, ratio=True))
            if nodes == 10:
                time.sleep(20)  # what the start set in motion comes to rest
                pids = daemons(lab)
                before = cost(pids)
                time.sleep(idle_s)
                after = cost(pids)
                share = (after[0] - before[0]) / len(pids) / idle_s * 100
                rows.append(row("idle cpu", nodes, share, "% of a core", 0, 0.1, ratio=False))
                memory = max(resident_mib(pid) for pid in pids)
                rows.append(
                    row("resident", nodes, memory, "MiB", reference_mib(), 1.15, ratio=True)
                )
                written = after[1] - before[1]
                rows.append(row("idle writes", nodes, written, "bytes", 0, 0, ratio=False))
        finally:
            site.down()
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'NAME':<12} {'N':>3} {'VALUE':>9} {'REFERENCE':>9} {'RATIO':>6} {'TARGET':>6}  OK")
    for each in rows:
        print(
            f"{each['name']:<12} {each['n']:>3} {each['value']:>9.3f} {each['reference']:>9.3f} "
            f"{each['ratio']:>6.2f} {each['target']:>6}  {'yes' if each['ok'] else 'NO'} "
            f"({each['unit']})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
