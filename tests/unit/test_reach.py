# SPDX-License-Identifier: Apache-2.0
"""Which registration address is taken, against real TLS servers on this machine."""

import contextlib
import hashlib
import http.server
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k3sagentd.errors import MachineError
from k3sagentd.k3s import reach
from tests import certificates

HEAD_START_S = 0.3
Serve = Callable[..., str]


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Clients that do not like the certificate are what is tested."""


@pytest.fixture
def serve(tmp_path: Path, monkeypatch) -> Iterator[Serve]:
    """Starts a server of cluster ``name``; returns its URL."""
    monkeypatch.setattr(reach, "HEAD_START_S", HEAD_START_S)
    with contextlib.ExitStack() as stack:

        def start(name: str, *, slow_s: float = 0.0, status: int = 200, says: bytes = b"") -> str:
            context = certificates.serving(tmp_path / name, "127.0.0.1")
            body = (tmp_path / name / "ca.crt").read_bytes()

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    time.sleep(slow_s)
                    if says:
                        self.wfile.write(says)
                        return
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *arguments: object) -> None:
                    pass

            # Not HTTPServer, which asks the DNS for its own name.
            server = Server(("127.0.0.1", 0), Handler)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"https://127.0.0.1:{server.server_address[1]}"

        yield start


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and says nothing, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"https://127.0.0.1:{sock.getsockname()[1]}"


def ca_hash(tmp_path: Path, name: str = "ours") -> str:
    return hashlib.sha256((tmp_path / name / "ca.crt").read_bytes()).hexdigest()


def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"https://127.0.0.1:{sock.getsockname()[1]}"


def test_the_first_is_taken_and_no_other_is_asked(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "HEAD_START_S", 10.0)
    first = serve("ours")
    with socket.create_server(("127.0.0.1", 0)) as second:
        second.settimeout(2 * HEAD_START_S)
        urls = (first, f"https://127.0.0.1:{second.getsockname()[1]}")
        assert reach.find(urls, ca_hash(tmp_path)) == first
        with pytest.raises(TimeoutError):
            second.accept()


def test_one_that_is_slow_is_still_preferred(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "HEAD_START_S", 10.0)
    urls = (serve("ours", slow_s=HEAD_START_S), serve("ours"))
    assert reach.find(urls, ca_hash(tmp_path)) == urls[0]


def test_a_silent_one_costs_its_head_start(tmp_path: Path, serve: Serve, silent: str) -> None:
    url = serve("ours")
    begun_s = time.monotonic()
    assert reach.find((silent, url), ca_hash(tmp_path)) == url
    assert HEAD_START_S <= time.monotonic() - begun_s < HEAD_START_S + 2


def test_others_that_are_wrong_cost_nothing(tmp_path: Path, serve: Serve) -> None:
    url = serve("ours")
    wrong = (refused(), serve("theirs"), serve("starting", status=503))
    begun_s = time.monotonic()
    assert reach.find((*wrong, url), ca_hash(tmp_path)) == url
    assert time.monotonic() - begun_s < HEAD_START_S + 2


def test_a_certificate_for_another_name_is_the_last_resort(tmp_path: Path, serve: Serve) -> None:
    url = serve("ours")
    unnamed = url.replace("127.0.0.1", "localhost")
    assert reach.find((unnamed, serve("theirs"), url), ca_hash(tmp_path)) == url
    assert reach.find((unnamed, refused()), ca_hash(tmp_path)) == unnamed
    with pytest.raises(reach.UnnamedError, match="its certificate is not for localhost"):
        reach.check(unnamed, ca_hash(tmp_path))


def test_what_each_one_said_is_told(tmp_path: Path, serve: Serve, silent: str, monkeypatch) -> None:
    monkeypatch.setattr(reach, "ALL_TIMEOUT_S", 10 * HEAD_START_S)
    theirs, starting, nobody = serve("theirs"), serve("starting", status=503), refused()
    other = serve("other", says=b"SSH-2.0-x\r\n")
    serve("ours")
    with pytest.raises(MachineError) as caught:
        reach.find((theirs, silent, starting, nobody, other), ca_hash(tmp_path))
    text = str(caught.value)
    ours = ca_hash(tmp_path)
    assert f"{theirs} has CA {ca_hash(tmp_path, 'theirs')}, but the site's is {ours}" in text
    assert f"{silent} cannot be reached: no answer in time" in text
    assert f"{starting} answers 503" in text
    assert f"{nobody} cannot be reached: [Errno 111] Connection refused" in text
    assert f"{other}/cacerts: the answer is not HTTP" in text
