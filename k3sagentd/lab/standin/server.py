# SPDX-License-Identifier: Apache-2.0
"""``k3s server``: chooses its datastore (K3S.md 1), founds or joins a cluster (4), and lives.

Owns the order in which things happen. What is answered on :6443 is in ``supervisor`` and ``api``.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from k3sagentd import systemd
from k3sagentd.lab.standin import agent, nodes, pki
from k3sagentd.lab.standin.api import ADDRESSES, Api
from k3sagentd.lab.standin.client import ServerClient, ServerError
from k3sagentd.lab.standin.controllers import Controllers
from k3sagentd.lab.standin.etcd import Etcd, EtcdError
from k3sagentd.lab.standin.members import Members, etcd_directory
from k3sagentd.lab.standin.nodes import OwnNode
from k3sagentd.lab.standin.objects import ApiError, Objects
from k3sagentd.lab.standin.options import Knobs, Options, fatal, log, node_password
from k3sagentd.lab.standin.store import EtcdStore, SqliteStore, Store
from k3sagentd.lab.standin.supervisor import Supervisor
from k3sagentd.lab.standin.tokens import Tokens

LEASE_LOST_S = 20.0
"""After this without quorum K3s ends: ``leaderelection lost`` (K3S.md 4)."""
CHECK_S = 2.0
CONTROL_S = 1.0
ADDRESS_TTL_S, ADDRESS_RENEW_S = 15, 5.0
"""kube-apiserver's endpoint of each server (pkg/controlplane/reconcilers/lease.go)."""
FIRST_MIGRATING = (1, 22, 2)
"""Older releases start empty beside a SQLite file (K3S.md 1)."""
SERVICE_IP = "10.43.0.1"


class Server:
    """One server."""

    def __init__(self, options: Options, knobs: Knobs, data: Path) -> None:
        self._options = options
        self._knobs = knobs
        self._agent_data = data / "agent"
        self._data = data / "server"
        self._tls = self._data / "tls"
        self._db = self._data / "db"
        self._members: Members | None = None
        self._tokens = Tokens(options, self._data)
        self._founded = False
        self._was_reset = False

    async def run(self) -> None:
        """Start, then live until something ends it."""
        options = self._options
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        if options.cluster_reset and options.server:
            fatal(
                "cannot perform cluster-reset while server URL is set - remove server from "
                "configuration before resetting"
            )
        options.labels  # noqa: B018 (bad ones end it before it has a datastore)
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        etcd = Etcd(etcd_directory(self._data), options.node_ip, tombstone=self._knobs.tombstone)
        members = Members(etcd, options.node_name, options.node_ip)
        wants_etcd = options.cluster_init or options.cluster_reset
        if members.initialised or wants_etcd or (options.server and options.token):
            self._members = members
            store: Store = EtcdStore(etcd)
            await self._start_etcd(members)
            await members.until_member()
            if self._founded:
                await self._migrate(store)
        else:
            pki.make_cas(self._tls)
            self._db.mkdir(parents=True, exist_ok=True)
            store = SqliteStore(self._db / "state.db")
            self._tokens.check_local()
            await self._serve(store)
        await self._tokens.check(store)
        await self._live(store)

    def _stop(self) -> None:
        """In order, as K3s does: etcd hands its leadership over."""
        if self._members is not None:
            self._members.etcd.stop()
        os._exit(0)

    # --- start ------------------------------------------------------------------------------

    async def _start_etcd(self, members: Members) -> None:
        """Go on, found, join or reset; the supervisor says ``starting`` from here on."""
        options = self._options
        if members.initialised:
            log.info("Managed etcd cluster bootstrap already complete and initialized")
            join = await self._join_access()
            if join is None:
                self._tokens.check_local()
            if options.cluster_reset:
                await members.reset()
                sys.exit(0)
            self._was_reset = members.finish_reset()
            if not members.bury():
                await self._serve(EtcdStore(members.etcd))
                members.resume()
            elif join is not None:
                await self._join(members, join)
            else:
                # As the source has it: without a server that answers, a new cluster begins.
                await self._found(members)
        elif options.server:
            if not options.token:
                fatal("K3S_TOKEN is required to join a cluster")
            log.info("Managed etcd cluster not yet initialized")
            await self._join(members, ServerClient(options.server, self._tokens.token, "server"))
        else:
            log.info("Managed etcd cluster initializing")
            if self._tokens.token.startswith("K10") and not (self._tls / "server-ca.crt").exists():
                fatal("the first server needs a token in short form")
            self._tokens.check_local()
            if options.cluster_reset:
                pki.make_cas(self._tls)
                await members.reset()
                sys.exit(0)
            await self._found(members)

    async def _join_access(self) -> ServerClient | None:
        """The server that is configured, if it answers and takes our token."""
        if not self._options.server or not self._options.token:
            return None
        client = ServerClient(self._options.server, self._tokens.token, "server")
        try:
            await client.ask("GET", "/v1-k3s/server-bootstrap")
        except ServerError as error:
            log.warning("Unable to reconcile with datastore: %s", error)
            return None
        return client

    async def _found(self, members: Members) -> None:
        pki.make_cas(self._tls)
        await self._serve(EtcdStore(members.etcd))
        self._founded = True
        members.found()

    async def _join(self, members: Members, as_server: ServerClient) -> None:
        as_node = ServerClient(as_server.url, self._tokens.node_token, "node")
        try:
            await as_node.cacerts()
            self._compare(json.loads(await as_node.ask("GET", "/v1-k3s/config"))["critical"])
            bootstrap = await as_server.ask("GET", "/v1-k3s/server-bootstrap")
        except ServerError as error:
            fatal(f"starting kubernetes: preparing server: {error}")
        pki.adopt(self._tls, bootstrap)
        await self._serve(EtcdStore(members.etcd))
        request = {
            "node": self._options.node_name,
            "name": members.name,
            "peer_url": members.etcd.peer_url,
        }
        while True:
            try:
                answer = await as_server.ask("POST", "/v1-k3s/standin/member", request)
                break
            except ServerError as error:
                if error.status == 409:
                    members.forget_name()
                    fatal(
                        "etcd cluster join failed: duplicate node name found, please use a "
                        "unique name for this node"
                    )
                log.info("%s", error)
                await asyncio.sleep(1.0)
        members.join(json.loads(answer)["cluster"])

    def _compare(self, theirs: dict[str, str]) -> None:
        ours = self._options.critical
        for flag in sorted(theirs.keys() | ours.keys()):
            if theirs.get(flag) != ours.get(flag):
                log.error("critical configuration mismatched: %s", flag)
                fatal("critical configuration value mismatch between servers")

    async def _migrate(self, store: Store) -> None:
        """What a single server had in SQLite; the file is kept under another name."""
        state = self._db / "state.db"
        if not state.exists() or not migrates(self._knobs.version):
            return
        log.info("Migrating content from sqlite to etcd")
        for entry in (await SqliteStore(state).list("/registry/")).entries:
            await store.put(entry.key, entry.value)
        state.rename(self._db / "state.db.migrated")

    async def _serve(self, store: Store) -> None:
        """Listen on :6443, with a certificate for the names of now."""
        options = self._options
        pki.make_admin(self._tls)
        objects = Objects(store)
        self._supervisor = Supervisor(
            self._data, options, self._knobs, self._tokens, store, self._members
        )
        app = web.Application(middlewares=[self._supervisor.guard])
        self._supervisor.add_routes(app.router)
        Api(store, objects, self._knobs.version).add_routes(app.router)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        domain = str(options.values.get("cluster-domain") or "cluster.local")
        names = ["kubernetes", *("kubernetes.default" + e for e in ("", ".svc", f".svc.{domain}"))]
        local = ["127.0.0.1", "::1", "localhost", options.node_name, options.node_ip, SERVICE_IP]
        context = pki.serving_context(self._tls, [*names, *local, *options.sans])
        await web.TCPSite(runner, port=6443, ssl_context=context).start()

    # --- life -------------------------------------------------------------------------------

    async def _live(self, store: Store) -> None:
        self._tokens.write()
        await asyncio.sleep(self._knobs.start_delay_s)
        objects = Objects(store)
        member_name = None if self._members is None else self._members.name
        own = OwnNode(objects, self._options, self._knobs.version, member_name)
        if self._was_reset:
            await store.delete(nodes.password_key(self._options.node_name))
        await self._register(store, own)
        await self._announce(store)
        self._supervisor.started = self._supervisor.ready = True
        log.info("k3s is up and running")
        systemd.notify(READY=1)
        controllers = Controllers(
            store, objects, self._members, node_grace_s=self._knobs.node_grace_s
        )
        await asyncio.gather(
            self._watch(store),
            _repeat(CONTROL_S, controllers.tick),
            _repeat(self._knobs.promote_s, self._promote),
            _repeat(min(nodes.BEAT_S, self._knobs.node_grace_s / 4), own.beat),
            _repeat(ADDRESS_RENEW_S, lambda: self._announce(store)),
        )

    async def _register(self, store: Store, own: OwnNode) -> None:
        """Its own Node, once the name is its own; until then it is not ready."""
        name = self._options.node_name
        while True:
            try:
                if await nodes.check_password(store, name, node_password()):
                    await own.register()
                    break
                why = agent.REJECTED
            except (EtcdError, ApiError) as error:
                why = str(error)
            log.info("Waiting to retrieve agent configuration; server is not ready: %s", why)
            await asyncio.sleep(agent.RETRY_S)
        certificate, key = pki.client_certificate(self._tls, f"system:node:{name}", pki.NODES)
        ca, client_ca = ((self._tls / f"{w}-ca.crt").read_bytes() for w in ("server", "client"))
        agent.write_kubelet(self._agent_data, ca, client_ca, certificate + key)
        await agent.serve_kubelet()

    async def _announce(self, store: Store) -> None:
        key = f"{ADDRESSES}{self._options.node_ip}:6443"
        if self._members is not None or await store.get(key) is None:
            await store.put(key, "", ttl_s=ADDRESS_TTL_S)

    async def _promote(self) -> None:
        if self._members is not None and await self._members.etcd.leads():
            await self._members.promote()

    async def _watch(self, store: Store) -> None:
        """End with etcd, and once the quorum is gone for too long."""
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            if self._members is not None:
                self._members.etcd.check_alive()
            try:
                await self._tokens.follow(store)
                last_s = time.monotonic()
                self._supervisor.ready = True
            except EtcdError:
                self._supervisor.ready = False
                if time.monotonic() - last_s > LEASE_LOST_S:
                    fatal("leaderelection lost for k3s")


def migrates(version: str) -> bool:
    """Whether that release takes over what SQLite holds."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) >= FIRST_MIGRATING


async def _repeat(period_s: float, what: Callable[[], Awaitable[None]]) -> None:
    """For ever; a failure is said when it is another than the last."""
    said = ""
    while True:
        await asyncio.sleep(period_s)
        try:
            await what()
            said = ""
        except (EtcdError, ApiError) as error:
            if str(error) != said:
                log.error("%s", error)
            said = str(error)


def main(options: Options, knobs: Knobs, data: Path) -> int:
    """Run until it ends."""
    try:
        asyncio.run(Server(options, knobs, data).run())
    except OSError as error:
        log.critical("%s", error)
        sys.exit(1)
    return 0
