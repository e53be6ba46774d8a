# SPDX-License-Identifier: Apache-2.0
"""``virtual-ip``: Debian's keepalived keeps one address among the servers, and it moves."""

import socket
import subprocess
import threading
import time

import pytest

from k3sagentd.lab import network, site
from tests.lab import bystander
from tests.lab.conftest import FAST, Bench

VIP = "10.77.0.100"
VRRP = 112
"""IP protocol number (RFC 3768, section 5.2.5)."""
PATIENCE_S = 120.0
"""For what takes below 4 s (three lost adverts and a skew) or below 10 s (three checks that fail,
2 s apart, and a skew), on a machine that is busy."""
STOP = "from k3sagentd.k3s import supervise; from k3sagentd.paths import Paths; "


def holders() -> list[str]:
    found = []
    for name in site.load().machines:
        if VIP in network.run("ip", "-n", network.namespace(name), "-4", "address", "show", "eth0"):
            found.append(name)
    return found


class Client:
    """Asks the address all the time; when it was answered."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.answered: list[float] = []
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def _read(self, lines) -> None:
        for line in lines:
            self.answered.append(float(line))

    def wait_for_answer(self, after_s: float, timeout_s: float) -> float:
        """When the first answer after ``after_s`` came."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.answered and self.answered[-1] > after_s:
                return next(at_s for at_s in self.answered if at_s > after_s)
            time.sleep(0.02)
        pytest.fail(f"{VIP} did not answer in {timeout_s} s; held by {holders()}")


def moved(before: str, timeout_s: float) -> str:
    """The one that has the address once ``before`` has not."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = holders()
        if len(found) == 1 and found != [before]:
            return found[0]
        if time.monotonic() > deadline:
            pytest.fail(f"{VIP} is on {found} after {timeout_s} s, was on {before}")
        time.sleep(0.05)


def sniff() -> socket.socket:
    """Every frame on this machine's own interfaces: nothing of the lab may come here."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
    sock.setblocking(False)
    return sock


def leaked(sock: socket.socket) -> list[bytes]:
    vip, found = socket.inet_aton(VIP), []
    while True:
        try:
            data = sock.recv(2048)
        except BlockingIOError:
            return found
        if vip in data and (data[9:10] == bytes([VRRP]) or data[:2] == b"\x00\x01"):
            found.append(data)


def test_the_address_moves_with_a_machine_and_with_k3s(lab: Bench) -> None:
    with sniff() as outside:
        _test(lab)
        assert leaked(outside) == []


def _test(lab: Bench) -> None:
    lab.run("up", "--nodes", "4", "--wait", "complete", *FAST, "--set", f"virtual-ip={VIP}/24")
    servers = [n for n, v in lab.views().items() if v["node"]["role"] == "server"]
    holder = moved("", PATIENCE_S)
    assert holder in servers
    agent = next(name for name in site.load().machines if name not in servers)
    assert not (site.load().machine(agent) / "etc/keepalived/keepalived.conf").exists()
    lab.until(
        lambda v: all(x["site"]["registration"][0] == f"https://{VIP}:6443" for x in v.values())
    )
    # Nobody takes it for the holder's own address.
    lab.until(lambda v: all(row["address"] != VIP for x in v.values() for row in x["nodes"]))

    bystander.plug_in("laptop", 80)
    with bystander.running("laptop", "poll", f"https://{VIP}:6443/ping") as process:
        client = Client(process)
        client.wait_for_answer(0.0, PATIENCE_S)

        lab.run("kill", holder)
        cut_s = time.monotonic()
        heir = moved(holder, PATIENCE_S)
        outage_s = client.wait_for_answer(cut_s, PATIENCE_S) - cut_s
        print(f"virtual IP: answers {outage_s:.1f} s after its holder lost power")
        assert heir in servers

        # It comes back, and takes nothing from the one that has it.
        lab.run("start", holder)
        lab.until(lambda v: v[holder]["node"]["phase"] == "ready")
        lab.until(lambda _: holders() == [heir])

        stopped_s = time.monotonic()
        lab.inside(heir, "/usr/bin/python3", "-c", STOP + "supervise.stop(Paths())")
        third = moved(heir, PATIENCE_S)
        outage_s = client.wait_for_answer(time.monotonic(), PATIENCE_S) - stopped_s
        print(f"virtual IP: answers {outage_s:.1f} s after K3s alone ended on its holder")
        assert third in servers
        lab.until(lambda _: holders() == [third])
