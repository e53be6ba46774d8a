# SPDX-License-Identifier: Apache-2.0
"""The stand-in alone, driven by hand as an operator drives K3s: no daemon takes part.

Each machine runs ours, but they are too few to agree, so that they leave K3s alone.
"""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import yaml

from k3sagentd.lab import network, site

TOKEN = "a-token-of-the-lab"
TIMEOUT_S = 90.0
KNOBS = {"promote_s": 1, "node_grace_s": 4}
ETCDCTL = ("env", "ETCDCTL_API=3", "etcdctl")
TLS = "/var/lib/rancher/k3s/server/tls/"
AGENT = "/var/lib/rancher/k3s/agent/"
ADMIN = (f"{TLS}server-ca.crt", f"{TLS}client-admin.crt", f"{TLS}client-admin.key")
KUBELET = (f"{AGENT}server-ca.crt", f"{AGENT}client-kubelet.crt", f"{AGENT}client-kubelet.key")
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
RUN = 'echo $$ > /etc/rancher/k3s.pid; exec k3s "$@" >> /var/log/k3s.log 2>&1'
API = """
import http.client, json, ssl, sys
host, ca, crt, key, method, path, body = sys.argv[1:8]
context = ssl.create_default_context(cafile=ca)
if crt:
    context.load_cert_chain(crt, key)
connection = http.client.HTTPSConnection(host, 6443, context=context, timeout=10)
connection.request(method, path, body or None, {"Content-Type": "application/json"})
response = connection.getresponse()
print(json.dumps([response.status, json.loads(response.read())]))
"""
CROWD = """
import asyncio, json, sys
import aiohttp

async def ask(session):
    url, auth = "https://127.0.0.1:6443/v1-k3s/config", aiohttp.BasicAuth("node", sys.argv[1])
    async with session.get(url, auth=auth, ssl=False) as response:
        return response.status, response.headers.get("Retry-After")

async def main():
    async with aiohttp.ClientSession() as session:
        print(json.dumps(await asyncio.gather(*(ask(session) for _ in range(int(sys.argv[2]))))))

asyncio.run(main())
"""


class Hands:
    """Machines, and what a person does at them."""

    def __init__(self, count: int, **knobs: object) -> None:
        self.lab = site.Lab(nodes=9, token="", knobs=KNOBS | knobs)
        site.create(self.lab, owned=False)
        self.names = [self.lab.add() for _ in range(count)]
        for name in self.names:
            self.lab.start(name)

    def url(self, name: str) -> str:
        return f"https://{network.address_of(self.lab.machines[name])}:6443"

    def path(self, name: str, path: str):
        return self.lab.machine(name) / path.removeprefix("/")

    def configure(self, name: str, **values: object) -> None:
        directory = self.path(name, "/etc/rancher/k3s")
        directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({key.replace("_", "-"): value for key, value in values.items()})
        (directory / "config.yaml").write_text(text)

    def secure(self, name: str, password: str = TOKEN, user: str = "server") -> str:
        """A token bound to the CA that ``name`` has."""
        found = self.path(name, "/var/lib/rancher/k3s/server/token").read_text()
        return f"{found.partition('::')[0]}::{user}:{password}"

    def start(self, name: str, *command: str, role: str = "server") -> None:
        pid = self.path(name, "/etc/rancher/k3s.pid")
        pid.unlink(missing_ok=True)
        self.path(name, "/var/log/k3s.log").write_text("")
        inside = self.lab.command_in(name, ["sh", "-c", RUN, "sh", role, *command])
        subprocess.Popen(inside, stdin=subprocess.DEVNULL, start_new_session=True)
        self.until(lambda: pid.exists() and pid.read_text(), f"{name} starts")

    def stop(self, name: str) -> None:
        self.inside(name, "sh", "-c", "kill $(cat /etc/rancher/k3s.pid)")
        self.until(lambda: not self.runs(name), "it stops")

    def runs(self, name: str) -> bool:
        return self.status(name, "sh", "-c", "kill -0 $(cat /etc/rancher/k3s.pid)") == 0

    def log(self, name: str) -> str:
        return self.path(name, "/var/log/k3s.log").read_text(errors="replace")

    def up(self, name: str, *command: str) -> None:
        """Start a server, and wait until it is ready."""
        self.start(name, *command)
        self.until_log(name, "k3s is up and running")

    def until_log(self, name: str, text: str) -> None:
        self.until(lambda: text in self.log(name), f"{name} says {text!r}", name)

    def until(self, what: Callable[[], object], why: str, name: str | None = None) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not what():
            if time.monotonic() > deadline:
                log = self.log(name)[-2000:] if name else ""
                pytest.fail(f"not in {TIMEOUT_S:.0f} s: {why}\n{log}")
            time.sleep(0.2)

    def _run(self, name: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.lab.command_in(name, list(command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )

    def inside(self, name: str, *command: str) -> str:
        done = self._run(name, command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log(name)[-900:]}"
        return done.stdout

    def status(self, name: str, *command: str) -> int:
        return self._run(name, command).returncode

    def api(
        self,
        name: str,
        method: str,
        path: str,
        body: dict | None = None,
        *,
        who: tuple[str, str, str] = ADMIN,
        host: str = "127.0.0.1",
    ) -> tuple[int, dict]:
        """Ask the API, verifying the server's certificate for ``host``."""
        text = json.dumps(body) if body is not None else ""
        command = (sys.executable, "-c", API, host, *who, method, path, text)
        status, answer = json.loads(self.inside(name, *command))
        return status, answer

    def nodes(self, name: str) -> dict[str, dict]:
        found = json.loads(self.inside(name, "k3s", "kubectl", "get", "nodes", "-o", "json"))
        return {each["metadata"]["name"]: each for each in found["items"]}

    def ready(self, name: str) -> dict[str, str]:
        return {
            n: each["status"]["conditions"][-1]["status"] for n, each in self.nodes(name).items()
        }

    def members(self, name: str) -> list[str]:
        """Node names of the etcd members."""
        found = json.loads(self.inside(name, *ETCDCTL, "-w", "json", "member", "list"))
        return sorted(each["name"].rpartition("-")[0] for each in found["members"])


@pytest.fixture
def hands() -> Iterator[Callable[..., Hands]]:
    """Makes machines; nothing of them stays."""
    site.down()
    yield Hands
    site.down()


def test_servers_and_agents_come_and_go(hands: Callable[..., Hands]) -> None:
    at = hands(4)
    one, two, three, agent = at.names
    common = {"agent_token": "for-agents"}
    at.configure(one, cluster_init=True, token=TOKEN, tls_san=["site.lab"], **common)
    at.up(one)
    for name in (two, three):
        at.configure(name, server=at.url(one), token=at.secure(one), **common)
        at.up(name)
    at.configure(
        agent,
        server=at.url(one),
        token=at.secure(one),
        node_label=["k3sagentd/node-id=n4"],
    )
    at.start(agent, role="agent")
    # The server's token is not the agents' here, and a kubelet is up only once it has joined.
    at.until_log(agent, "/v1-k3s/config: 401 Unauthorized")
    assert at.status(agent, "sh", "-c", "exec 3<>/dev/tcp/127.0.0.1/10248") != 0
    at.stop(agent)
    token = at.secure(one, "for-agents", "node")
    at.configure(agent, server=at.url(one), token=token, node_label=["k3sagentd/node-id=n4"])
    at.start(agent, role="agent")
    at.until(lambda: set(at.nodes(two)) == {one, two, three, agent}, "four Nodes")
    assert at.members(one) == [one, two, three]
    found = at.nodes(one)
    assert found[agent]["metadata"]["labels"]["k3sagentd/node-id"] == "n4"
    assert "node-role.kubernetes.io/etcd" not in found[agent]["metadata"]["labels"]
    assert found[two]["metadata"]["labels"]["node-role.kubernetes.io/etcd"] == "true"
    _who_may_ask(at, one, agent)
    _one_of_many_writes(at, (one, two, three))
    _an_agent_is_deleted_and_made_anew(at, one, agent)
    _a_server_is_deleted(at, one, three)


def _who_may_ask(at: Hands, one: str, agent: str) -> None:
    assert at.api(one, "GET", "/api/v1/nodes", who=(ADMIN[0], "", ""))[0] == 401
    assert at.api(one, "GET", "/api/v1/nodes", host="localhost")[0] == 200
    host = network.address_of(at.lab.machines[one])
    for path, expected in (
        ("/api/v1/nodes", 403),
        (f"/api/v1/nodes/{agent}", 200),
        (f"/api/v1/nodes/{one}", 403),
        (LEASES, 403),
    ):
        assert at.api(agent, "GET", path, who=KUBELET, host=host)[0] == expected, path
    assert at.api(agent, "DELETE", f"/api/v1/nodes/{agent}", who=KUBELET, host=host)[0] == 403
    code = f"import ssl; print(ssl.get_server_certificate(('{host}', 6443)))"
    pem = at.inside(agent, sys.executable, "-c", code)
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName"],
        input=pem,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("DNS:site.lab", "DNS:kubernetes,", f"DNS:{one}", f"Address:{host}"):
        assert name in shown, shown


def _one_of_many_writes(at: Hands, servers: tuple[str, ...]) -> None:
    """Of writers with the same resourceVersion, on three servers at once, one is right."""
    status, made = at.api(servers[0], "POST", LEASES, {"metadata": {"name": "k3sagentd"}})
    assert status == 201
    assert at.api(servers[1], "POST", LEASES, {"metadata": {"name": "k3sagentd"}})[0] == 409
    running = []
    for number in range(9):
        body = json.dumps({"metadata": made["metadata"], "spec": {"holderIdentity": str(number)}})
        command = (
            sys.executable,
            "-c",
            API,
            "127.0.0.1",
            *ADMIN,
            "PUT",
            f"{LEASES}/k3sagentd",
            body,
        )
        inside = at.lab.command_in(servers[number % 3], list(command))
        running.append(subprocess.Popen(inside, stdout=subprocess.PIPE, text=True))
    statuses = sorted(json.loads(each.communicate(timeout=60)[0])[0] for each in running)
    assert statuses == [200] + [409] * 8


def _an_agent_is_deleted_and_made_anew(at: Hands, one: str, agent: str) -> None:
    at.stop(agent)
    at.until(lambda: at.ready(one)[agent] == "Unknown", "the silent agent is missed")
    assert set(at.ready(one).values()) == {"True", "Unknown"}
    uid = at.nodes(one)[agent]["metadata"]["uid"]
    shutil.rmtree(at.path(agent, "/etc/rancher/node"))
    at.start(agent, role="agent")
    at.until_log(agent, "Node password rejected")
    assert at.status(one, "k3s", "kubectl", "drain", agent) == 1
    at.inside(
        one, "k3s", "kubectl", "drain", agent, "--ignore-daemonsets", "--delete-emptydir-data"
    )
    assert at.nodes(one)[agent]["spec"]["unschedulable"] is True
    status, _ = at.api(one, "DELETE", f"/api/v1/nodes/{agent}", {"preconditions": {"uid": "no"}})
    assert status == 409
    at.inside(one, "k3s", "kubectl", "delete", "node", agent)
    at.until(lambda: agent in at.nodes(one), "it comes back by itself")
    assert at.nodes(one)[agent]["metadata"]["uid"] != uid


def _a_server_is_deleted(at: Hands, one: str, gone: str) -> None:
    db = at.path(gone, "/var/lib/rancher/k3s/server/db")
    at.inside(one, "k3s", "kubectl", "delete", "node", gone)
    assert gone not in at.members(one)
    at.until(lambda: not at.runs(gone), "K3s of the removed member ends")
    assert "This node has been removed from the cluster" in at.log(gone)
    assert (db / "etcd/tombstone").exists()
    at.up(gone)
    assert list(db.glob("etcd-backup-*"))
    at.until(lambda: gone in at.members(one), "it is a member again")
    # The first server has nobody to join: what K3s makes of it is a cluster of its own.
    other = at.names[1]
    at.inside(other, "k3s", "kubectl", "delete", "node", one)
    at.until(lambda: not at.runs(one), "K3s of the removed member ends")
    at.up(one)
    assert at.members(one) == [one]
    assert at.members(other) == sorted((other, gone))


def test_an_address_changes_and_the_cluster_is_reset(hands: Callable[..., Hands]) -> None:
    at = hands(2)
    one, two = at.names
    at.configure(one, cluster_init=True, token=TOKEN)
    at.up(one)
    at.configure(two, server=at.url(one), token=at.secure(one))
    at.up(two)
    at.stop(one)
    at.stop(two)
    for name, address in ((one, "10.77.0.111"), (two, "10.77.0.112")):
        at.inside(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    at.configure(two, token=TOKEN, node_ip="10.77.0.112", server="https://10.77.0.111:6443")
    assert at.status(two, "k3s", "server", "--cluster-reset") == 1, "while server is set"
    at.configure(two, token=TOKEN, node_ip="10.77.0.112")
    at.inside(two, "k3s", "server", "--cluster-reset")
    flag = at.path(two, "/var/lib/rancher/k3s/server/db/reset-flag")
    assert flag.exists()
    assert at.status(two, "k3s", "server", "--cluster-reset") == 1, "it was done"
    at.up(two)
    assert not flag.exists()
    assert at.members(two) == [two]
    assert set(at.nodes(two)) == {one, two}, "the data is still there"
    # The other has a member of the old cluster, which it cannot be any more.
    at.configure(one, token=TOKEN, node_ip="10.77.0.222")
    at.start(one)
    at.until(lambda: not at.runs(one), "etcd cannot bind")
    assert "bind: cannot assign requested address" in at.log(one)
    db = at.path(one, "/var/lib/rancher/k3s/server/db")
    db.rename(db.with_name("db.aside"))
    at.configure(
        one, token=at.secure(two), node_ip="10.77.0.111", server="https://10.77.0.112:6443"
    )
    at.up(one)
    assert at.members(two) == [one, two]
    assert at.nodes(two)[one]["status"]["addresses"][0]["address"] == "10.77.0.111"
    # One of them moves: it is up, and no member.
    at.stop(one)
    at.configure(one, token=at.secure(two), server="https://10.77.0.112:6443")
    at.start(one)
    at.until_log(one, "this server is a not a member of the etcd cluster. Found [")
    assert at.runs(one)
    assert at.status(one, "k3s", "kubectl", "get", "nodes") == 1, "it is not ready"


def test_the_token_is_rotated_and_crowds_are_told_to_wait(hands: Callable[..., Hands]) -> None:
    at = hands(2, request_s=3)
    one, two = at.names
    at.configure(one, cluster_init=True, token=TOKEN)
    at.up(one)
    at.configure(two, server=at.url(one), token=at.secure(one), node_name=one)
    at.start(two)
    at.until_log(two, "duplicate node name found")
    at.configure(two, server=at.url(one), token=at.secure(one))
    at.up(two)
    answers = json.loads(at.inside(one, sys.executable, "-c", CROWD, TOKEN, "30"))
    # Who comes when the first were answered is served as well.
    assert len(answers) == 30
    assert answers.count([200, None]) >= 20
    assert answers.count([429, "1"]) == 30 - answers.count([200, None]) > 0

    seal = at.path(two, "/var/lib/rancher/k3s/server/token-hash")
    before = seal.read_text()
    at.inside(one, "k3s", "token", "rotate", "--token", TOKEN, "--new-token", "another-token")
    text = at.path(one, "/var/lib/rancher/k3s/server/token").read_text()
    assert text.endswith("::server:another-token\n")
    at.until(lambda: seal.read_text() != before, "the other server's etcd has the new token")
    at.stop(two)
    at.start(two)
    at.until_log(two, "bootstrap data already found and encrypted with different token")
    at.configure(two, server=at.url(one), token=at.secure(one, "another-token"))
    at.up(two)
    assert at.members(one) == [one, two]


def test_a_single_server_is_converted(hands: Callable[..., Hands]) -> None:
    at = hands(1, version="v1.31.2+k3s1")
    (one,) = at.names
    at.configure(one, token=TOKEN)
    at.up(one)
    assert "k3s version v1.31.2+k3s1 (" in at.inside(one, "k3s", "--version")
    assert set(at.nodes(one)) == {one}
    assert "etcd" not in at.inside(one, "k3s", "kubectl", "get", "nodes")
    at.stop(one)
    db = at.path(one, "/var/lib/rancher/k3s/server/db")
    with sqlite3.connect(db / "state.db") as database:
        row = ("/registry/configmaps/default/mine", b"a value")
        database.execute("INSERT INTO kine (name, deleted, value) VALUES (?, 0, ?)", row)
    at.configure(one, token=TOKEN, cluster_init=True)
    at.up(one)
    assert "a value" in at.inside(one, *ETCDCTL, "get", "/registry/configmaps/default/mine")
    assert (db / "state.db.migrated").exists()
    assert "etcd" in at.inside(one, "k3s", "kubectl", "get", "nodes")
