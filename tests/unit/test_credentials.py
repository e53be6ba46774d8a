# SPDX-License-Identifier: Apache-2.0
"""Which of K3s's tokens a machine is given: asked of servers that keep to K3S.md 2."""

import base64
import datetime
import hashlib
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from k3sagentd import site_token
from k3sagentd.core.k3s import Action, Order, Outcome, ServerOrAgent
from k3sagentd.errors import HopelessError, MachineError
from k3sagentd.k3s import credentials
from k3sagentd.k3s.apply import apply
from k3sagentd.k3s.order import read_result, write_order
from k3sagentd.keys import derive
from k3sagentd.paths import Paths
from k3sagentd.site_token import Tokens

OLD, NEW = (site_token.generate().encode() for _ in range(2))
AGENT_OLD, AGENT_NEW = (derive(each).agent_token for each in (OLD, NEW))
CA = "k3s-server-ca@1"


@dataclass
class Authority:
    """A CA, and leaves of it for 127.0.0.1."""

    directory: Path
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        made = self._builder(CA, self.key).add_extension(constraints, critical=True)
        self.pem = made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        self.hash = hashlib.sha256(self.pem).hexdigest()

    def _builder(self, name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2020, 1, 1))
            .not_valid_after(datetime.datetime(2120, 1, 1))
        )

    def context(self) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        leaf = self._builder("k3s", key).add_extension(names, critical=False)
        pem = leaf.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file = self.directory / "leaf.pem"
        file.write_bytes(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@dataclass
class Server:
    """As much of a K3s server as is asked."""

    authority: Authority
    passwords: dict[str, str]
    """By user."""
    shows: bytes = b""
    """As ``/cacerts``, if not its CA."""
    answers: list[int] = field(default_factory=list)
    """Status codes that it gives first, whatever it is asked."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    mute: str = ""
    """A path at which it does not speak HTTP."""

    def answer(self, path: str, authorization: str) -> tuple[int, bytes]:
        if path == "/cacerts":
            return 200, self.shows or self.authority.pem
        assert path == "/v1-k3s/config"
        user, _, password = (
            base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        )
        self.asked.append((user, password))
        if self.answers:
            return self.answers.pop(0), b""
        if self.passwords.get(user) != password:
            return 401, b""
        return (200, b"{}") if user == "node" else (403, b"")

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == server.mute:
                    self.wfile.write(b"SSH-2.0-x\r\n")
                    return
                status, body = server.answer(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.http.socket = self.authority.context().wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def serve(authority: Authority) -> Iterator[Callable[..., Server]]:
    """``serve(server password, node password)`` starts a server."""
    running: list[Server] = []

    def start(server: bytes, node: str | bytes, **other: Any) -> Server:
        password = node if isinstance(node, str) else node.decode()
        one = Server(authority, {"server": server.decode(), "node": password}, **other)
        one.start()
        running.append(one)
        return one

    yield start
    for each in running:
        each.http.shutdown()
        each.http.server_close()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "root")
    for each in (found.config.parent, found.run, found.k3s_token.parent, found.k3s_data):
        each.mkdir(parents=True)
    return found


def join(role: ServerOrAgent, *servers: Server) -> Order:
    return Order(
        action=Action.JOIN,
        epoch=0,
        role=role,
        node_name="n",
        servers=tuple(each.url for each in servers),
        ca_hash=servers[0].authority.hash,
    )


def agent(*servers: Server) -> Order:
    return join(ServerOrAgent.AGENT, *servers)


def server(*servers: Server) -> Order:
    return join(ServerOrAgent.SERVER, *servers)


INIT = Order(action=Action.INIT, epoch=0, role=ServerOrAgent.SERVER, node_name="n")


def own_token(paths: Paths, token: bytes) -> None:
    """K3s ran here as a server with ``token``."""
    paths.k3s_own_token.parent.mkdir(parents=True)
    paths.k3s_own_token.write_text(f"K10{'a' * 64}::server:{token.decode()}\n")
    (paths.k3s_data / "server/db/etcd/member/wal").mkdir(parents=True)


def choose(order: Order, tokens: Tokens | None, paths: Paths) -> credentials.Credentials:
    return credentials.choose(order, None, tokens, paths)


# --- agents ---------------------------------------------------------------------------------


def test_an_agent_is_given_the_agent_token(serve, paths: Paths) -> None:
    one = serve(OLD, AGENT_OLD)
    found = choose(agent(one), Tokens(OLD), paths)
    assert found.token == f"K10{one.authority.hash}::node:{AGENT_OLD}"
    assert one.asked == [("node", AGENT_OLD)], "the server token left this machine needlessly"


def test_a_cluster_without_agent_token_takes_the_server_token(serve, paths: Paths) -> None:
    one = serve(OLD, OLD)
    found = choose(agent(one), Tokens(OLD), paths)
    assert found.token == f"K10{one.authority.hash}::server:{OLD.decode()}"


def test_an_agent_goes_where_the_newest_token_is_taken(serve, paths: Paths) -> None:
    behind, ahead = serve(OLD, AGENT_OLD), serve(NEW, AGENT_NEW)
    for tokens in (Tokens(OLD, next=NEW), Tokens(NEW, previous=OLD)):
        found = choose(agent(behind, ahead), tokens, paths)
        assert (found.token.rpartition(":")[2], found.server) == (AGENT_NEW, ahead.url)
    assert choose(agent(behind), Tokens(NEW, previous=OLD), paths).token.endswith(AGENT_OLD)


def test_no_token_is_shown_to_who_only_shows_the_ca(serve, paths: Paths, tmp_path: Path) -> None:
    genuine = serve(OLD, AGENT_OLD)
    (tmp_path / "thief").mkdir()
    thief = Server(Authority(tmp_path / "thief"), {}, shows=genuine.authority.pem)
    thief.start()
    order = replace(agent(genuine), servers=(thief.url,))
    with pytest.raises(MachineError, match="cannot be asked"):
        choose(order, Tokens(OLD), paths)
    thief.http.shutdown()
    thief.http.server_close()
    assert thief.asked == []


def test_another_ca_is_not_asked(serve, paths: Paths) -> None:
    one = serve(OLD, AGENT_OLD)
    order = replace(agent(one), ca_hash="b" * 64)
    with pytest.raises(MachineError, match=f"has CA {one.authority.hash}, but the site's is bbbb"):
        choose(order, Tokens(OLD), paths)
    assert one.asked == []


def test_a_cluster_with_another_token_is_said(serve, paths: Paths) -> None:
    with pytest.raises(MachineError, match="takes no token that this machine has"):
        choose(agent(serve(NEW, AGENT_NEW)), Tokens(OLD), paths)


def test_a_busy_server_is_asked_again(serve, paths: Paths, monkeypatch) -> None:
    monkeypatch.setattr(credentials, "BUSY_S", 0.001)
    one = serve(OLD, AGENT_OLD, answers=[429, 429])
    assert choose(agent(one), Tokens(OLD), paths).token.endswith(AGENT_OLD)
    one.answers = [503]
    with pytest.raises(MachineError, match="answers 503"):
        choose(agent(one), Tokens(OLD), paths)


@pytest.mark.parametrize("path", ["/cacerts", "/v1-k3s/config"])
def test_who_does_not_speak_http_is_a_server_that_does_not_answer(
    serve, paths: Paths, path: str
) -> None:
    broken, other = serve(OLD, AGENT_OLD, mute=path), serve(OLD, AGENT_OLD)
    tokens = Tokens(OLD)
    with pytest.raises(MachineError, match="the answer is not HTTP"):
        credentials.choose(agent(broken), broken.url, tokens, paths)
    assert credentials.choose(agent(broken, other), None, tokens, paths).server == other.url


def test_an_agent_that_is_in_keeps_what_it_has_when_nobody_answers(serve, paths: Paths) -> None:
    one = serve(OLD, AGENT_OLD)
    order = replace(agent(one), servers=("https://127.0.0.1:1",))
    paths.k3s_token.write_text("K10::node:kept\n")
    with pytest.raises(MachineError, match="cannot be reached"):
        choose(order, Tokens(OLD), paths)
    (paths.k3s_data / "agent").mkdir()
    (paths.k3s_data / "agent/client-kubelet.crt").touch()
    assert choose(order, Tokens(OLD), paths).token == "K10::node:kept"


def test_an_agent_without_the_token_stays_what_it_is_and_nothing_else(serve, paths: Paths) -> None:
    one = serve(OLD, AGENT_OLD)
    paths.k3s_token.write_text("K10::node:kept\n")
    with pytest.raises(HopelessError, match="forgot the site's token"):
        choose(agent(one), None, paths)  # K3s's data is gone: it would join anew
    (paths.k3s_data / "agent").mkdir()
    (paths.k3s_data / "agent/client-kubelet.crt").touch()
    assert choose(agent(one), None, paths).token == "K10::node:kept"
    for order in (server(one), INIT):
        with pytest.raises(HopelessError, match="give it the token again"):
            choose(order, None, paths)
    assert one.asked == []


# --- servers --------------------------------------------------------------------------------


def test_the_first_server_makes_the_agent_token(paths: Paths) -> None:
    found = choose(INIT, Tokens(OLD), paths)
    assert (found.token, found.agent_token) == (OLD.decode(), AGENT_OLD)


def test_a_cluster_that_was_there_before_goes_on_without(paths: Paths) -> None:
    own_token(paths, OLD)
    assert choose(INIT, Tokens(OLD), paths).agent_token is None
    paths.k3s_agent_token.touch()  # but one that we gave it stays
    assert choose(INIT, Tokens(OLD), paths).agent_token == AGENT_OLD


@pytest.mark.parametrize(
    ("node", "wanted"), [(AGENT_OLD, AGENT_OLD), (OLD, None)], ids=["with", "without"]
)
def test_a_server_does_as_the_others(serve, paths: Paths, node, wanted: str | None) -> None:
    one = serve(OLD, node)
    found = choose(server(one), Tokens(OLD), paths)
    assert found.token == f"K10{one.authority.hash}::server:{OLD.decode()}"
    assert found.agent_token == wanted


def test_k3s_with_another_token_is_not_given_ours(serve, paths: Paths) -> None:
    one = serve(NEW, NEW)
    own_token(paths, NEW)
    for order in (server(one), INIT):
        with pytest.raises(HopelessError, match="has another token than the site"):
            choose(order, Tokens(OLD), paths)


def test_a_server_goes_over_when_k3s_has_and_not_before(serve, paths: Paths) -> None:
    other = serve(OLD, AGENT_OLD)
    own_token(paths, OLD)
    paths.k3s_agent_token.touch()
    for tokens in (Tokens(OLD, next=NEW), Tokens(NEW, previous=OLD)):
        found = choose(server(other), tokens, paths)
        assert found.token.endswith(OLD.decode()), "K3s would not start again"
        assert found.agent_token == AGENT_OLD
    # «k3s token rotate» was given here: K3s wrote it down, the others go by the old one yet.
    paths.k3s_own_token.write_text(f"K10{'a' * 64}::server:{NEW.decode()}\n")
    found = choose(server(other), Tokens(NEW, previous=OLD), paths)
    assert found.token.endswith(NEW.decode())
    assert found.agent_token == AGENT_NEW
    assert choose(INIT, Tokens(NEW, previous=OLD), paths).token == NEW.decode()


def test_a_server_goes_over_when_another_has(serve, paths: Paths) -> None:
    behind, ahead = serve(OLD, AGENT_OLD), serve(NEW, AGENT_NEW)
    own_token(paths, OLD)
    found = choose(server(behind, ahead), Tokens(NEW, previous=OLD), paths)
    assert found.token.endswith(NEW.decode())
    assert (found.agent_token, found.server) == (AGENT_NEW, ahead.url)


def test_a_server_alone_keeps_what_it_has(serve, paths: Paths) -> None:
    order = replace(server(serve(OLD, AGENT_OLD)), servers=("https://127.0.0.1:1",))
    own_token(paths, OLD)
    paths.k3s_agent_token.touch()
    found = choose(order, Tokens(NEW, previous=OLD), paths)
    assert found.token.endswith(OLD.decode())
    assert found.agent_token == AGENT_OLD


# --- what root writes -----------------------------------------------------------------------


def carry_out(paths: Paths, order: Order) -> None:
    paths.token.write_bytes(OLD + b"\n")
    paths.token.chmod(0o600)
    binary = paths.root / "k3s"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    text = f"nodes: 3\ninstall: {{method: exec, binary: {binary}}}\n"
    paths.config.write_text(text + "ignore-preflight: [clock, ports, memory, disk, cgroup]\n")
    write_order(paths, order)
    apply(paths)
    result = read_result(paths)
    assert result is not None
    assert result.outcome is Outcome.DONE, result.reason


def holders(paths: Paths, secret: bytes) -> list[str]:
    files = [each for each in paths.root.rglob("*") if each.is_file()]
    return sorted(each.name for each in files if secret in each.read_bytes())


@pytest.fixture
def no_k3s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k3sagentd.k3s.supervise.start", lambda *_: None)


def test_what_root_writes_for_an_agent_does_not_hold_the_server_token(
    serve, paths: Paths, no_k3s: None
) -> None:
    carry_out(paths, agent(serve(OLD, AGENT_OLD)))
    assert holders(paths, OLD) == ["token"], "only where the site's own token is"
    assert holders(paths, AGENT_OLD.encode()) == ["k3sagentd-token"]
    assert paths.k3s_token.stat().st_mode & 0o777 == 0o600


def test_what_root_writes_for_a_server_has_both(serve, paths: Paths, no_k3s: None) -> None:
    carry_out(paths, server(serve(OLD, AGENT_OLD)))
    assert holders(paths, OLD) == ["k3sagentd-token", "token"]
    assert paths.k3s_agent_token.read_text() == f"{AGENT_OLD}\n"
    assert paths.k3s_agent_token.stat().st_mode & 0o777 == 0o600
    assert f"agent-token-file: {paths.k3s_agent_token}" in paths.dropin.read_text()


def test_a_server_that_is_to_do_without_loses_the_file_last(
    serve, paths: Paths, no_k3s: None
) -> None:
    paths.k3s_agent_token.write_text("x")
    carry_out(paths, server(serve(OLD, OLD)))
    assert not paths.k3s_agent_token.exists()
    assert "agent-token" not in paths.dropin.read_text()
