# SPDX-License-Identifier: Apache-2.0
"""K3s's own ports are asked straight, whatever proxy the unit has for the download of K3s."""

import http.server
import re
import socketserver
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import k3sagentd
from k3sagentd.errors import MachineError
from k3sagentd.k3s import credentials, reach, servers
from k3sagentd.k3s.trust import insecure
from tests import certificates

PONG = b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\npong"
ELSEWHERE = b"HTTP/1.0 302 Found\r\nLocation: https://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
NONSENSE = b"\x1b[2Jno HTTP\r\n\r\n"
CUT_OFF = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\npong"
Serve = Callable[..., str]


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Clients that go away."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """``serve(bytes)`` starts a server that answers with them; returns its URL."""
    running: list[Server] = []

    def start(answer: bytes, *, tls: bool = True) -> str:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().strip():
                    pass
                self.wfile.write(answer)

        server = Server(("127.0.0.1", 0), Handler)
        if tls:
            context = certificates.serving(tmp_path, "127.0.0.1")
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the proxy of the environment was asked; it refuses all."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(urllib.request, "_opener", None)  # it looks once for the environment's
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,127.0.0.0/8")
    yield asked
    server.shutdown()
    server.server_close()


def test_no_proxy_is_asked(serve: Serve, proxy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url, plain = serve(PONG), serve(PONG, tls=False)
    assert reach.fetch_cacerts(url) == b"pong"
    assert credentials.takes(url, insecure(), "node", "password")
    monkeypatch.setattr(servers, "PING", f"{url}/ping")
    assert servers.pings()
    monkeypatch.setattr(credentials, "HEALTHZ", f"{plain}/healthz")
    assert not credentials.is_stuck(credentials.ServerOrAgent.AGENT)
    assert proxy == []


def test_no_redirection_is_followed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve(ELSEWHERE)
    with pytest.raises(MachineError, match=f"{url} answers 302"):
        reach.fetch_cacerts(url)
    with pytest.raises(MachineError, match=f"{url} answers 302"):
        credentials.takes(url, insecure(), "node", "password")
    monkeypatch.setattr(servers, "PING", f"{url}/ping")
    assert not servers.pings()


@pytest.mark.parametrize(
    ("answer", "name"),
    [(NONSENSE, "BadStatusLine"), (CUT_OFF, "IncompleteRead")],
    ids=["nonsense", "cut off"],
)
def test_an_answer_that_is_none_is_said(serve: Serve, answer: bytes, name: str) -> None:
    url = serve(answer)
    for ask in (reach.fetch_cacerts, lambda url: credentials._trusting(url, "a" * 64)):
        with pytest.raises(MachineError) as caught:
            ask(url)
        assert str(caught.value) == (
            f"{url}/cacerts: the answer is not HTTP, or is cut off ({name})"
        )
    with pytest.raises(MachineError, match="is not HTTP, or is cut off"):
        reach.find([url], "a" * 64)


def test_nonsense_is_no_answer_to_a_password_either(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(NONSENSE)
    with pytest.raises(MachineError, match=f"^{url}/v1-k3s/config: the answer is not HTTP"):
        credentials.takes(url, insecure(), "node", "password")
    monkeypatch.setattr(servers, "PING", f"{url}/ping")
    assert not servers.pings()
    monkeypatch.setattr(credentials, "HEALTHZ", serve(NONSENSE, tls=False))
    assert not credentials.is_stuck(credentials.ServerOrAgent.AGENT), "it would be restarted"


def test_only_the_download_of_k3s_goes_by_the_environment() -> None:
    """``trust_env`` would have aiohttp use its proxies."""
    directory = Path(k3sagentd.__file__).parent
    found = {
        str(file.relative_to(directory))
        for file in directory.rglob("*.py")
        if re.search(r"urlopen\(|trust_env|getproxies", file.read_text())
    }
    assert found == {"k3s/install.py"}
