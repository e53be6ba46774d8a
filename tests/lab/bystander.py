# SPDX-License-Identifier: Apache-2.0
"""What other machines on the lab's wire do: look a name up, ask, forward, pose as a server.

Run inside a network namespace (and not as a part of the product): nothing here uses its mDNS.
"""

import contextlib
import http.server
import json
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from k3sagentd.lab import network
from tests import certificates
from tests.lab.conftest import ROOT

MDNS = ("224.0.0.251", 5353)
TYPE_A, CLASS_IN = 1, 1


def plug_in(name: str, number: int) -> str:
    """One more machine on the wire, without anything of ours; returns its address."""
    network.plug_in(name, number)
    return network.address_of(number)


def command(name: str, *arguments: str) -> list[str]:
    """The command line for this program on machine ``name``."""
    enter = ["ip", "netns", "exec", network.namespace(name)]
    return [*enter, sys.executable, "-m", "tests.lab.bystander", *arguments]


def ask(name: str, *arguments: str) -> object:
    """Run it there; its answer."""
    done = subprocess.run(
        command(name, *arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextlib.contextmanager
def running(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Let it run there, from its first line of output on."""
    process = subprocess.Popen(
        command(name, *arguments), cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.wait()


# --- what is run there ----------------------------------------------------------------------


def resolve(name: str, seconds: float) -> dict[str, list[str]]:
    """Every responder's own answer to a one-shot query (RFC 6762, sections 5.1 and 6.7)."""
    labels = b"".join(bytes([len(each)]) + each.encode() for each in name.split("."))
    query = struct.pack("!6H", 7, 0, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, TYPE_A, CLASS_IN)
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(query, MDNS)
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            sock.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                packet, sender = sock.recvfrom(9000)
                found[sender[0]] = sorted({*found.get(sender[0], []), *addresses(packet)})
    return found


def addresses(packet: bytes) -> list[str]:
    """The A records among a response's answers (RFC 1035, section 4.1)."""
    questions, answers = struct.unpack("!2H", packet[4:8])
    at = 12
    for _ in range(questions):
        at = after_name(packet, at) + 4
    found = []
    for _ in range(answers):
        at = after_name(packet, at)
        kind, _, ttl, length = struct.unpack("!HHIH", packet[at : at + 10])
        if kind == TYPE_A and ttl:
            found.append(socket.inet_ntoa(packet[at + 10 : at + 14]))
        at += 10 + length
    return found


def after_name(packet: bytes, at: int) -> int:
    while packet[at]:
        if packet[at] >= 0xC0:
            return at + 2
        at += 1 + packet[at]
    return at + 1


def avahi(name: str) -> str:
    """An address by avahi-daemon's own socket, as libnss-mdns asks; empty where it has none."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(10)
        sock.connect("/run/avahi-daemon/socket")
        sock.sendall(f"RESOLVE-HOSTNAME-IPV4 {name}\n".encode())
        words = sock.recv(4096).decode().split()
        # + interface protocol name address; or - and why not
        return words[4] if words[0] == "+" else ""
    return ""


def fetch(host: str, address: str, authority: str) -> str:
    """``https://host:6443/cacerts`` at ``address``, verified by ``host``."""
    context = ssl.create_default_context(cafile=authority)
    with (
        socket.create_connection((address, 6443), 5) as sock,
        context.wrap_socket(sock, server_hostname=host) as tls,
    ):
        tls.sendall(f"GET /cacerts HTTP/1.0\r\nHost: {host}:6443\r\n\r\n".encode())
        data = b""
        while part := tls.recv(65536):
            data += part
    return data.partition(b"\r\n\r\n")[2].decode()


def poll(url: str) -> None:
    """Ask ``url`` again and again; a line for each time it answers ``pong``: when."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    print("begun", flush=True)
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            with urllib.request.urlopen(url, timeout=0.5, context=context) as response:
                assert response.read() == b"pong"
            print(time.monotonic(), flush=True)
        time.sleep(0.05)


def forward(to: str) -> None:
    """A load balancer: :6443 here is :6443 there."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("", 6443)) as listener:
        print("begun", flush=True)
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((to, 6443), 5)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()


def pose(directory: str, address: str) -> None:
    """A server of another cluster: all is well with it, but its CA is its own."""
    context = certificates.serving(Path(directory), address)
    body = Path(directory, "ca.crt").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    class Server(socketserver.ThreadingTCPServer):  # not HTTPServer: it asks the DNS for its name
        allow_reuse_address = True

    server = Server(("", 6443), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print("begun", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["resolve", name, seconds]:
            print(json.dumps(resolve(name, float(seconds))))
        case ["avahi", name]:
            print(avahi(name))
        case ["fetch", host, address, authority]:
            print(json.dumps(fetch(host, address, authority)))
        case ["poll", url]:
            poll(url)
        case ["forward", to]:
            forward(to)
        case ["pose", directory, address]:
            pose(directory, address)
