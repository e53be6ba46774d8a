# SPDX-License-Identifier: Apache-2.0
"""What the kernel sees of a vote: the file and its directory are synced before the answer."""

import re
import subprocess
import sys
import time
from pathlib import Path

from k3sagentd.lab import network, site
from tests.lab.conftest import FAST, ROOT, Bench
from tests.sim.disk import WRITE_ATOMICALLY

ASK = """
import asyncio, sys, tempfile
from pathlib import Path
from k3sagentd.core.messages import Intent, Prepare, Promise
from k3sagentd.core.paxos import Ballot
from k3sagentd.hardware import Hardware
from k3sagentd.identity import load_or_create
from k3sagentd.keys import derive
from k3sagentd.peer import wire
from k3sagentd.peer.client import PeerClient
from k3sagentd.peer.tls import client_context

async def ask():
    keys = derive(Path(sys.argv[1]).read_bytes().strip())
    with tempfile.TemporaryDirectory() as state:
        me = load_or_create(Path(state), keys, Hardware())
        client = PeerClient(client_context([keys.ca_certificate], me))
        prepare = Prepare(
            decree=0, ballot=Ballot(round=1, node=me.node), intent=Intent.NOMINATE, nodes=3
        )
        body = wire.encode(wire.exchange([prepare]))
        reply = await client.post(sys.argv[2], 6440, "/v1/exchange", body, 10)
        message, = wire.decode(wire.Exchange, reply.body).messages
        assert isinstance(message, Promise), message
        await client.close()

asyncio.run(ask())
"""
CALLS = (
    "openat,write,fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg,recvfrom,recvmsg,read"
)


def test_an_acceptor_syncs_file_and_directory_before_it_answers(lab: Bench, tmp_path: Path) -> None:
    lab.run("up", "--nodes", "3", *FAST)
    for name in ("node2", "node3"):
        lab.run("kill", name)
    lab.until(lambda v: v["node1"]["site"]["seen"] == 1)
    # A fresh identity: whatever the three had agreed on meanwhile is gone.
    lab.run("kill", "node1")
    machine = site.load().machine("node1")
    for each in (machine / "var/lib/k3sagentd").iterdir():
        each.unlink()
    lab.run("start", "node1")
    lab.until(lambda v: v["node1"]["node"]["phase"] == "discovering")
    trace = tmp_path / "trace"
    daemon = daemon_of("node1")
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-y",
            "-s",
            "16",
            "-o",
            str(trace),
            "-e",
            f"trace={CALLS}",
            "-p",
            str(daemon),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        threads = Path(f"/proc/{daemon}/task")
        while any("TracerPid:\t0\n" in (t / "status").read_text() for t in threads.iterdir()):
            assert tracer.poll() is None, "strace does not attach"
            time.sleep(0.05)
        enter = ["ip", "netns", "exec", network.SWITCH, "env", f"PYTHONPATH={ROOT}"]
        token = machine / "etc/k3sagentd/token"
        subprocess.run(
            [*enter, sys.executable, "-c", ASK, str(token), network.address_of(1)],
            check=True,
            cwd="/",
            timeout=30,
        )
    finally:
        tracer.terminate()
        tracer.wait(10)
    told = [call for call in map(kind_of, trace.read_text().splitlines()) if call]
    at = told.index("rename")
    before, after = told[:at], told[at + 1 :]
    assert [c for c in before if c != "answer"][-2:] == ["write", "fsync"], told
    # Nothing leaves on a peer's connection between the vote's first byte and the directory's sync.
    assert after[0] == "fsync directory", told
    assert "answer" in after, "it never answered"
    last_write = len(before) - 1 - before[::-1].index("write")
    assert "answer" not in before[last_write:], told
    order = [call for call in told[last_write:] if call != "answer"]
    assert tuple(order[: len(WRITE_ATOMICALLY)]) == WRITE_ATOMICALLY


def daemon_of(name: str) -> int:
    """The daemon's pid, as seen from here."""
    first = site.load().pid(name)
    home = Path(f"/proc/{first}/ns/pid").readlink()
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if (entry / "ns/pid").readlink() == home and words[1:4] == [
                b"-m",
                b"k3sagentd",
                b"run",
            ]:
                return int(entry.name)
        except (OSError, ValueError):
            continue
    raise AssertionError("no daemon")


def kind_of(line: str) -> str | None:
    """A line of the trace in the simulator's words; None for what is not about the vote."""
    line = re.sub(r"^\d+ +", "", line)
    if re.match(r"write\(\d+<[^>]*/\.log\.json\.", line):
        return "write"
    if re.match(r"fsync\(\d+<[^>]*/\.log\.json\.", line):
        return "fsync"
    if re.match(r"rename(at2?)?\(.*log\.json", line):
        return "rename"
    if re.match(r"fsync\(\d+<[^>]*/var/lib/k3sagentd>", line):
        return "fsync directory"
    if re.match(r"(sendto|sendmsg|write)\(\d+<(TCP|socket:)", line):
        return "answer"
    return None
