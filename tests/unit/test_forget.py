# SPDX-License-Identifier: Apache-2.0
"""``forget-token``: what a member keeps, and what root wants to see before it wipes the token."""

import asyncio
import http.server
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k3sagentd import membership, site_token, store
from k3sagentd.config import load_config
from k3sagentd.core import machine, state
from k3sagentd.core.hello import own_hello
from k3sagentd.core.k3s import ServerOrAgent
from k3sagentd.core.log import Nominate, Seal
from k3sagentd.core.state import Durable, Site
from k3sagentd.core.words import NodeId, NodePhase, Role
from k3sagentd.daemon import forget as daemon_forget
from k3sagentd.daemon.engine import Engine
from k3sagentd.daemon.forget import Forget
from k3sagentd.errors import ConfigError, TokenForgottenError
from k3sagentd.files import write_atomically
from k3sagentd.hardware import Hardware
from k3sagentd.k3s import forget
from k3sagentd.keys import derive
from k3sagentd.membership import Membership
from k3sagentd.paths import Paths
from k3sagentd.peer.tls import client_context
from k3sagentd.site_token import Tokens

TOKEN, OTHER = (site_token.generate().encode() for _ in range(2))
KEYS, OTHER_KEYS = derive(TOKEN), derive(OTHER)
PI, OTHER_PI = Hardware(serial="aa"), Hardware(serial="bb")


@pytest.fixture
def kubelet(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Answers as the kubelet does, with ``status``."""
    says = {"status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(says["status"])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(forget, "HEALTHZ", f"http://127.0.0.1:{server.server_address[1]}/healthz")
    monkeypatch.setattr("k3sagentd.k3s.supervise.running", lambda *_: True)
    yield says
    server.shutdown()
    server.server_close()


def member(paths: Paths, *others: bytes, shown: bytes = TOKEN) -> Membership:
    tokens = Tokens(shown, *others)
    keys = [derive(each) for each in tokens.accepted]
    return membership.from_tokens(tokens, keys, paths.state, PI)


@pytest.fixture
def paths(tmp_path: Path, kubelet: dict[str, int]) -> Paths:
    """A machine that may forget."""
    found = Paths(tmp_path)
    agent = found.k3s_data / "agent"
    for each in (found.config.parent, found.run, found.k3s_token.parent, agent):
        each.mkdir(parents=True)
    found.config.write_text("nodes: 3\ninstall: {method: exec}\nforget-token: true\n")
    (agent / "client-kubelet.crt").touch()
    found.k3s_token.write_text(f"K10{'a' * 64}::node:{KEYS.agent_token}\n")
    put(found.token, TOKEN)
    membership.keep(found.state, member(found))
    return found


def put(path: Path, token: bytes) -> None:
    path.write_bytes(token + b"\n")
    path.chmod(0o600)


def ask(paths: Paths) -> str:
    """The daemon asks; root's answer."""
    paths.forget.touch()
    forget.forget(paths)
    assert not paths.forget.exists(), "the path unit would start root again and again"
    return paths.forget_result.read_text()


# --- root -----------------------------------------------------------------------------------


def test_the_token_is_overwritten_and_a_note_is_left(paths: Paths) -> None:
    with paths.token.open("rb") as kept:
        assert ask(paths) == ""
        assert kept.read().strip(b"\0") == b"", "removed, but not overwritten"
    assert not paths.token.exists()
    assert KEYS.site_id in paths.token_forgotten.read_text()
    everything = [each for each in paths.root.rglob("*") if each.is_file()]
    assert not [each for each in everything if TOKEN in each.read_bytes()]
    assert ask(paths) == "", "a second time is as good"


class Killed(BaseException):
    """The power went."""


def kill_at(monkeypatch: pytest.MonkeyPatch, instant: int) -> None:
    """The change of the disk with this number does not happen."""
    left = [instant]

    def stopping(real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "open"), (os, "fsync")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))


@pytest.mark.parametrize("asked", [True, False])
def test_killed_at_any_instant_it_starts_again_and_the_token_goes(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Asked again, or, as who has no token does not ask, with the next order."""
    instant, killed = 0, True
    while killed:
        put(paths.token, TOKEN)
        paths.token_forgotten.unlink(missing_ok=True)
        paths.forget.touch()
        with monkeypatch.context() as patch:
            kill_at(patch, instant)
            try:
                forget.forget(paths)
                killed = False
            except Killed:
                pass
        found = site_token.load_unless_forgotten(paths.token, paths.token_forgotten)
        assert found in (None, Tokens(TOKEN)), f"at instant {instant}"
        if asked:
            assert ask(paths) == ""
        elif found is None:
            paths.forget.unlink(missing_ok=True)
            forget.forget(paths)
        if asked or found is None:
            everything = [each for each in paths.root.rglob("*") if each.is_file()]
            assert not [each for each in everything if TOKEN in each.read_bytes()]
            assert {each.name for each in paths.config.parent.glob(".*")} <= {
                ".token.forgotten.new"
            }
        instant += 1
    assert instant > 10, "nothing was ever killed"


def no_request(paths: Paths) -> None:
    paths.config.write_text("nodes: 3\ninstall: {method: exec}\n")


def server_data(paths: Paths) -> None:
    (paths.k3s_data / "server/db/etcd/member/wal").mkdir(parents=True)


def no_data(paths: Paths) -> None:
    (paths.k3s_data / "agent/client-kubelet.crt").unlink()


def was_a_server(paths: Paths) -> None:
    (paths.k3s_data / "server").mkdir()


def server_token(paths: Paths) -> None:
    paths.k3s_token.write_text(f"K10{'a' * 64}::server:{TOKEN.decode()}\n")


def server_token_elsewhere(paths: Paths) -> None:
    unit = paths.root / "etc/systemd/system/k3s-agent.service.env"
    unit.parent.mkdir(parents=True)
    unit.write_text(f"K3S_TOKEN={TOKEN.decode()}\n")


def server_data_aside(paths: Paths) -> None:
    token = paths.k3s_data.with_name("k3s.was-server") / "server/token"
    token.parent.mkdir(parents=True)
    token.write_text(f"K10{'a' * 64}::server:{TOKEN.decode()}\n")


def rotation(paths: Paths) -> None:
    put(site_token.next_path(paths.token), OTHER)


def nothing_kept(paths: Paths) -> None:
    (paths.state / membership.KEPT_FILE).unlink()


def kept_of_another_site(paths: Paths) -> None:
    membership.keep(paths.state, member(paths, shown=OTHER))


def kept_of_another_node(paths: Paths) -> None:
    elsewhere = Paths(paths.root / "elsewhere")
    membership.keep(paths.state, member(elsewhere))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_request, "forget-token is not set"),
        (server_data, "is not that of an agent"),
        (no_data, "is not that of an agent"),
        (was_a_server, "is not that of an agent"),
        (server_token, "k3sagentd-token has it too: the cluster runs without an agent token"),
        (server_token_elsewhere, "k3s-agent.service.env has it too"),
        (server_data_aside, "this machine was a server; remove the data that was moved aside"),
        (rotation, "a rotation is under way"),
        (nothing_kept, "site.json"),
        (kept_of_another_site, "site.json is of another site"),
        (kept_of_another_node, "the certificate is not this node's"),
    ],
)
def test_root_sees_for_itself(paths: Paths, spoil: Callable, reason: str) -> None:
    spoil(paths)
    assert reason in ask(paths)
    assert paths.token.read_bytes() == TOKEN + b"\n"
    assert not paths.token_forgotten.exists()


def test_k3s_must_run_and_be_well(paths: Paths, kubelet: dict[str, int], monkeypatch) -> None:
    kubelet["status"] = 500
    assert "the kubelet does not answer: HTTP Error 500" in ask(paths)
    monkeypatch.setattr("k3sagentd.k3s.supervise.running", lambda *_: False)
    assert "K3s does not run here" in ask(paths)
    assert paths.token.exists()


def test_the_kubelet_is_asked_without_a_proxy(paths: Paths, monkeypatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # it looks once for the environment's
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    assert ask(paths) == ""


def test_nobody_asked(paths: Paths) -> None:
    forget.forget(paths)
    assert paths.token.exists()
    assert not paths.forget_result.exists()


# --- what is kept ---------------------------------------------------------------------------


def test_a_member_goes_on_without_the_token(paths: Paths) -> None:
    before, after = member(paths), membership.from_kept(paths.state, PI)
    assert after.identity.node == before.identity.node
    assert (after.site_id, after.authorities) == (before.site_id, before.authorities)
    assert after.tokenless
    assert not before.tokenless
    assert after.node_passwords == ()
    client_context(after.authorities, after.identity)


def test_what_is_kept_makes_no_other_member(paths: Paths) -> None:
    kept = paths.state / membership.KEPT_FILE
    assert kept.stat().st_mode & 0o777 == 0o600
    text = kept.read_text()
    assert "PRIVATE" not in text
    for secret in (TOKEN.decode(), KEYS.agent_token, KEYS.election_key.hex()):
        assert secret not in text


def test_a_card_that_moved_needs_the_token(paths: Paths) -> None:
    with pytest.raises(ConfigError, match=r"moved here .*; give it the token again"):
        membership.from_kept(paths.state, OTHER_PI)
    with pytest.raises(ConfigError, match="give it the token again"):
        membership.from_kept(paths.root / "nowhere", PI)


# --- the daemon -----------------------------------------------------------------------------


class Nowhere:
    """Nothing leaves."""

    def send(self, to: object, message: object) -> None:
        """Lost."""

    def announce(self, hello: object) -> None:
        """Unheard."""

    def order(self, order: object) -> None:
        """Not carried out."""


def engine(paths: Paths, node: NodeId, *, tokenless: bool = False) -> Engine:
    """A machine that is an agent of a sealed site, ready."""
    site = Site(
        nodes=3, servers=1, role=Role.AUTO, election_key=b"k", hostname="n", instance="i",
        tokenless=tokenless,
    )  # fmt: skip
    init = NodeId("f" * 32)
    log = (Nominate(init=init, servers=(init,)), Seal(ca_hash="a" * 64, addresses=("https://x",)))
    durable = Durable(node=node, nodes=3, log=log)
    store.save(paths.state, durable)
    found = machine.new_node(site, durable, 0.0)
    return Engine(found.but(phase=NodePhase.READY), paths.state, Nowhere())


def forgetting(paths: Paths, who: Membership) -> Forget:
    found = engine(paths, who.identity.node, tokenless=who.tokenless)
    return Forget(found, load_config(paths), paths, who)


async def root(paths: Paths) -> None:
    while not paths.forget.exists():
        await asyncio.sleep(0.01)
    await asyncio.to_thread(forget.forget, paths)


def test_an_agent_that_is_ready_forgets_and_begins_anew(paths: Paths, monkeypatch) -> None:
    monkeypatch.setattr(daemon_forget, "POLL_S", 0.01)
    nothing_kept(paths)

    async def main() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(root(paths))
            tasks.create_task(forgetting(paths, member(paths)).run())

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    assert (
        caught.group_contains(TokenForgottenError)
        if hasattr(caught, "group_contains")
        else isinstance(caught.value.exceptions[0], TokenForgottenError)
    )
    assert not paths.token.exists()
    assert membership.from_kept(paths.state, PI).site_id == KEYS.site_id


def test_why_it_is_not_wiped_is_shown(paths: Paths, monkeypatch) -> None:
    monkeypatch.setattr(daemon_forget, "POLL_S", 0.01)
    server_token(paths)
    subject = forgetting(paths, member(paths))

    async def main() -> None:
        task = asyncio.create_task(subject.run())
        await root(paths)
        while not subject.notes():
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    assert "the token is still on this machine" in subject.notes()[0]
    assert "the cluster runs without an agent token" in subject.notes()[0]


def test_a_disk_that_takes_nothing_is_no_end_of_the_daemon(paths: Paths, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/state")

    monkeypatch.setattr(membership, "keep", full)
    subject = forgetting(paths, member(paths))

    async def main() -> None:
        task = asyncio.create_task(subject.run())
        while not subject.notes():
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    assert "/state cannot be written: No space left on device" in subject.notes()[0]


@pytest.mark.parametrize("phase", [NodePhase.JOINING, NodePhase.WAITING])
def test_not_before_it_is_ready(paths: Paths, phase: NodePhase) -> None:
    subject = forgetting(paths, member(paths))
    assert subject._due()
    subject._engine.node = subject._engine.node.but(phase=phase)
    assert not subject._due()


def test_not_as_a_server(paths: Paths, monkeypatch) -> None:
    subject = forgetting(paths, member(paths))
    monkeypatch.setattr(daemon_forget, "k3s_role", lambda _: ServerOrAgent.SERVER)
    assert not subject._due()


def test_not_while_the_token_is_rotated(paths: Paths) -> None:
    subject = forgetting(paths, member(paths, OTHER))
    assert not subject._due()
    assert "a rotation is under way" in subject.notes()[0]


def test_who_forgot_has_nothing_to_forget_and_says_so(paths: Paths) -> None:
    subject = forgetting(paths, membership.from_kept(paths.state, PI))
    asyncio.run(subject.run())
    assert "forgot the site's token" in subject.notes()[0]


def test_who_forgot_is_never_a_candidate(paths: Paths) -> None:
    node = member(paths).identity.node
    assert own_hello(engine(paths, node, tokenless=True).node).role is Role.AGENT
    assert own_hello(engine(paths, node).node).role is Role.AUTO
    assert state.Site.__dataclass_fields__["tokenless"].default is False


def test_a_request_is_a_name_and_nothing_else(paths: Paths) -> None:
    write_atomically(paths.forget, b"/etc/passwd", durable=False)
    forget.forget(paths)
    assert not paths.forget.exists()
    assert paths.forget_result.read_text() == ""
