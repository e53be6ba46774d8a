# SPDX-License-Identifier: Apache-2.0
"""``k3s server``: chooses its datastore (K3S.md 1), joins (4), answers on :6443 (3)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import BasicAuth, web

from k3sagentd import systemd
from k3sagentd.lab.standin import pki
from k3sagentd.lab.standin.client import ServerClient, ServerError
from k3sagentd.lab.standin.etcd import Etcd, EtcdError
from k3sagentd.lab.standin.options import Knobs, Options, fatal, log, node_password, password_of

MINIONS = "/registry/minions/"
PASSWORDS = "/registry/secrets/kube-system/"
LEASE_LOST_S = 20.0
"""After this without quorum K3s ends: ``leaderelection lost`` (K3S.md 4)."""
CHECK_S = 2.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """One server."""

    def __init__(self, options: Options, knobs: Knobs, data: Path) -> None:
        self._options = options
        self._knobs = knobs
        self._data = data / "server"
        self._tls = self._data / "tls"
        self._db = self._data / "db"
        self._etcd: Etcd | None = None
        self._ready = False
        self._started = False
        self._password = ""

    # --- start ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, then live until something ends it."""
        options = self._options
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        member = (self._db / "etcd/member/wal").exists()
        wants_etcd = options.cluster_init or (options.server and options.token)
        token = options.token or self._stored_token()
        self._password = password_of(token)
        self._check_token()
        if member:
            log.info("Managed etcd cluster bootstrap already complete and initialized")
            await self._serve()
            await self._start_etcd(None, new=False)
        elif wants_etcd and options.server:
            await self._join(options.server, token)
        elif wants_etcd:
            if token.startswith("K10"):
                fatal("the first server needs a token in short form")
            await self._found()
        else:
            await self._standalone()
        self._store_tokens()
        await asyncio.sleep(self._knobs.start_delay_s)
        await self._register()
        self._ready = True
        log.info("k3s is up and running")
        systemd.notify(READY=1)
        await self._live()

    def _stored_token(self) -> str:
        try:
            return (self._data / "token").read_text().strip()
        except FileNotFoundError:
            return secrets.token_hex(16)

    def _check_token(self) -> None:
        """Data of another token is not opened (K3S.md 2)."""
        seal = self._data / "token-hash"
        digest = hashlib.sha256(self._password.encode()).hexdigest()
        if seal.exists() and seal.read_text() != digest:
            fatal("bootstrap data already found and encrypted with different token")
        if not seal.exists():
            seal.write_text(digest)

    def _store_tokens(self) -> None:
        ca = hashlib.sha256((self._tls / "server-ca.crt").read_bytes()).hexdigest()
        token = self._data / "token"
        token.write_text(f"K10{ca}::server:{self._password}\n")
        token.chmod(0o600)
        link = self._data / "node-token"
        if not link.is_symlink():
            link.symlink_to(token)

    async def _found(self) -> None:
        log.info("Managed etcd cluster initializing")
        pki.make_ca(self._tls)
        await self._serve()
        name = self._member_name()
        await self._start_etcd(f"{name}=http://{self._options.node_ip}:2380", new=True)
        state = self._db / "state.db"
        if state.exists() and _converts(self._knobs.version):
            log.info("Migrating content from sqlite to etcd")
            assert self._etcd is not None
            with sqlite3.connect(state) as database:
                rows = "SELECT name, value FROM kine WHERE name LIKE '/registry/%'"
                for key, value in database.execute(rows):
                    await self._etcd.put(key, value)
            state.rename(self._db / "state.db.migrated")

    async def _standalone(self) -> None:
        """SQLite: a cluster of its own, silently (the trap of K3S.md 1)."""
        pki.make_ca(self._tls)
        self._db.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(self._db / "state.db") as database:
            database.execute("CREATE TABLE IF NOT EXISTS kine (name TEXT PRIMARY KEY, value TEXT)")
        await self._serve()

    async def _join(self, url: str, token: str) -> None:
        log.info("Managed etcd cluster not yet initialized")
        # As a server asks for the bootstrap data, as a node for the settings.
        as_node, as_server = (ServerClient(url, token, user) for user in ("node", "server"))
        try:
            certificate = await as_node.cacerts()
            theirs = json.loads(await as_node.ask("GET", "/v1-k3s/config"))
            for flag, value in sorted(theirs["critical"].items()):
                if self._options.critical.get(flag) != value:
                    log.error("critical configuration mismatched: %s", flag)
                    fatal("critical configuration value mismatch between servers")
            for flag in self._options.critical.keys() - theirs["critical"].keys():
                log.error("critical configuration mismatched: %s", flag)
                fatal("critical configuration value mismatch between servers")
            bootstrap = json.loads(await as_server.ask("GET", "/v1-k3s/server-bootstrap"))
        except ServerError as error:
            fatal(f"starting kubernetes: preparing server: {error}")
        pki.write_ca(self._tls, certificate, bootstrap["ca_key"].encode())
        await self._serve()
        name, peer = self._member_name(), f"http://{self._options.node_ip}:2380"
        while True:
            try:
                request = {"name": name, "node": self._options.node_name, "peer_url": peer}
                answer = await as_server.ask("POST", "/v1-k3s/standin/member", request)
                break
            except ServerError as error:
                if "duplicate node name" in str(error):
                    fatal(
                        "etcd cluster join failed: duplicate node name found, please use a "
                        "unique name for this node"
                    )
                log.info("%s", error)
                await asyncio.sleep(1.0)
        cluster = ",".join([*json.loads(answer)["cluster"], f"{name}={peer}"])
        await self._start_etcd(cluster, new=False)

    def _member_name(self) -> str:
        """The node's name with 8 hex of its own, kept beside the data."""
        path = self._db / "etcd-name"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self._options.node_name}-{secrets.token_hex(4)}")
        return path.read_text()

    async def _start_etcd(self, cluster: str | None, *, new: bool) -> None:
        self._etcd = Etcd(self._db / "etcd", self._options.node_ip)
        self._etcd.start(self._member_name(), cluster, new=new)
        await self._etcd.wait_until_up()
        while True:
            own = [m for m in await self._etcd.members() if self._etcd.peer_url in m["peerURLs"]]
            if own and not own[0].get("isLearner"):
                return
            if not own:
                log.error(
                    "this server is a not a member of the etcd cluster. Found [], expect: %s",
                    self._etcd.peer_url,
                )
            await asyncio.sleep(5.0 if not own else 0.5)
            self._etcd.check_alive()

    # --- life -------------------------------------------------------------------------------

    async def _register(self) -> None:
        """The server's own Node object and node password."""
        refused = await self._register_node(
            self._options.node_name, node_password(), "control-plane", self._options.node_ip
        )
        if refused:
            fatal(refused)

    async def _register_node(self, name: str, password: str, role: str, ip: str) -> str | None:
        digest = hashlib.sha256(password.encode()).hexdigest()
        key = f"{PASSWORDS}{name}.node-password.k3s"
        known = await self._get(key)
        if known is not None and known != digest:
            return (
                f"Node password rejected, duplicate hostname or contents of "
                f"'/etc/rancher/node/password' may not match server node-passwd entry: {name}"
            )
        node = {"name": name, "role": role, "ip": ip, "at": time.time()}
        await self._put(key, digest)
        await self._put(MINIONS + name, json.dumps(node))
        return None

    async def _live(self) -> None:
        """Promote learners; end once the quorum is gone for too long."""
        last_s = promoted_s = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            if self._etcd is None:
                continue
            self._etcd.check_alive()
            try:
                await self._etcd.get("/standin/up")
                last_s = time.monotonic()
                self._ready = True
                if time.monotonic() - promoted_s >= self._knobs.promote_s:
                    promoted_s = time.monotonic()
                    await self._etcd.promote()
            except EtcdError:
                self._ready = False
                if time.monotonic() - last_s > LEASE_LOST_S:
                    fatal("leaderelection lost for k3s")

    async def _get(self, key: str) -> str | None:
        if self._etcd is not None:
            return await self._etcd.get(key)
        with sqlite3.connect(self._db / "state.db") as database:
            row = database.execute("SELECT value FROM kine WHERE name = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    async def _put(self, key: str, value: str) -> None:
        if self._etcd is not None:
            await self._etcd.put(key, value)
            return
        with sqlite3.connect(self._db / "state.db") as database:
            database.execute("INSERT OR REPLACE INTO kine VALUES (?, ?)", (key, value))

    # --- :6443 ------------------------------------------------------------------------------

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/ping", self._ping)
        app.router.add_get("/cacerts", self._cacerts)
        app.router.add_get("/v1-k3s/readyz", self._readyz)
        app.router.add_get("/v1-k3s/apiservers", self._apiservers)
        app.router.add_get("/v1-k3s/config", self._config)
        app.router.add_get("/v1-k3s/server-bootstrap", self._bootstrap)
        app.router.add_post("/v1-k3s/standin/member", self._member)
        app.router.add_put("/v1-k3s/standin/node", self._node)
        app.router.add_get("/v1-k3s/standin/nodes", self._nodes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        context = pki.serving_context(self._tls, self._options.node_ip)
        await web.TCPSite(runner, port=6443, ssl_context=context).start()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """``starting`` until it is up; then who may ask what (K3S.md 2 and 3)."""
        if not self._ready and not self._started:
            return web.Response(status=503, text="starting")
        self._started = True
        path = request.path
        if path in ("/readyz", "/healthz"):
            return web.Response(status=401)
        if path in ("/ping", "/cacerts"):
            return await handler(request)
        try:
            auth = BasicAuth.decode(request.headers.get("Authorization", ""))
        except ValueError:
            return web.Response(status=401, text="Unauthorized")
        if auth.password != self._password or auth.login not in ("server", "node"):
            return web.Response(status=401, text="Unauthorized")
        wants = "server" if path.endswith(("server-bootstrap", "standin/member")) else "node"
        if auth.login != wants:
            return web.Response(status=403, text="Forbidden")
        try:
            return await handler(request)
        except EtcdError as error:
            return web.Response(status=500, text=str(error))

    async def _ping(self, request: web.Request) -> web.Response:
        return web.Response(text="pong")

    async def _cacerts(self, request: web.Request) -> web.Response:
        return web.Response(body=(self._tls / "server-ca.crt").read_bytes())

    async def _readyz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok") if self._ready else web.Response(status=503)

    async def _apiservers(self, request: web.Request) -> web.Response:
        if self._etcd is None:
            return web.json_response([f"{self._options.node_ip}:6443"])
        members = [m for m in await self._etcd.members() if not m.get("isLearner")]
        hosts = [m["peerURLs"][0].removeprefix("http://").split(":")[0] for m in members]
        return web.json_response([f"{host}:6443" for host in hosts])

    async def _config(self, request: web.Request) -> web.Response:
        return web.json_response({"critical": self._options.critical})

    async def _bootstrap(self, request: web.Request) -> web.Response:
        if self._etcd is None:
            return web.Response(status=400, text="etcd disabled")
        return web.json_response({"ca_key": (self._tls / "server-ca.key").read_text()})

    async def _member(self, request: web.Request) -> web.Response:
        if self._etcd is None:
            return web.Response(status=400, text="etcd disabled")
        wanted: dict[str, Any] = await request.json()
        members = await self._etcd.members()
        if any(m["peerURLs"] == [wanted["peer_url"]] for m in members):
            return web.json_response({"cluster": _initial(members, wanted["peer_url"])})
        if any(m.get("name", "").rpartition("-")[0] == wanted["node"] for m in members):
            return web.Response(status=409, text="duplicate node name found")
        await self._etcd.add_learner(wanted["peer_url"])
        return web.json_response({"cluster": _initial(members, wanted["peer_url"])})

    async def _node(self, request: web.Request) -> web.Response:
        node: dict[str, Any] = await request.json()
        refused = await self._register_node(node["name"], node["password"], "agent", node["ip"])
        return web.Response(status=403 if refused else 200, text=refused or "ok")

    async def _nodes(self, request: web.Request) -> web.Response:
        if self._etcd is None:
            return web.json_response([])
        return web.json_response([json.loads(each) for each in await self._etcd.values(MINIONS)])


def _converts(version: str) -> bool:
    """Whether a release converts SQLite to etcd; older ones start empty (K3S.md 1)."""
    return tuple(map(int, version.partition("+")[0][1:].split("."))) >= (1, 22, 2)


def _initial(members: list[dict[str, Any]], without: str) -> list[str]:
    """etcd's initial cluster, of those that were there before."""
    named = [m for m in members if m.get("name") and m["peerURLs"] != [without]]
    return [f"{m['name']}={m['peerURLs'][0]}" for m in named]


def main(options: Options, knobs: Knobs, data: Path) -> int:
    """Run until it ends."""
    try:
        asyncio.run(Server(options, knobs, data).run())
    except (KeyboardInterrupt, SystemExit):
        raise
    except OSError as error:
        log.critical("%s", error)
        sys.exit(1)
    return 0
