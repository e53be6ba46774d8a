# SPDX-License-Identifier: Apache-2.0
"""One run of the daemon: make the parts, join them, keep them until a signal or a failure."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import time
from typing import Any

from k3sagentd import schema, store, systemd
from k3sagentd.config import Config
from k3sagentd.control import ControlServer
from k3sagentd.core import guards, machine, registration, status, view
from k3sagentd.core.cluster import Errand, ErrandResult
from k3sagentd.core.events import AddressChanged, ErrandEnded, InitForced, LeaveAsked, Tick
from k3sagentd.core.hello import k3s_role, live_servers, name_answer, url_of
from k3sagentd.core.k3s import Order, ServerOrAgent
from k3sagentd.core.messages import Hello, LeaveStep, Message
from k3sagentd.core.state import Node, Site
from k3sagentd.core.words import NodeId
from k3sagentd.daemon.drive import Drive
from k3sagentd.daemon.engine import Engine
from k3sagentd.daemon.errands import Errands
from k3sagentd.daemon.forget import Forget
from k3sagentd.daemon.links import Links, Receiver
from k3sagentd.discovery import addresses, seeds
from k3sagentd.discovery.api_name import ApiName
from k3sagentd.discovery.mdns import Mdns
from k3sagentd.discovery.table import Source
from k3sagentd.errors import MachineError
from k3sagentd.hardware import mark_of
from k3sagentd.k3s.facts import MachineFacts, read_facts
from k3sagentd.keys import SiteKeys, mdns_name
from k3sagentd.membership import Membership, from_kept, from_tokens
from k3sagentd.paths import Paths
from k3sagentd.peer.client import PeerClient
from k3sagentd.peer.server import PeerServer
from k3sagentd.peer.tls import client_context, server_context
from k3sagentd.site_token import Tokens

log = logging.getLogger(__name__)

FACTS_POLL_S = 0.5
LEAVE_LOOK_S = 5.0
FACTS_LIMIT_S = 30.0
"""Well within the unit's WatchdogSec=; the unit's next start looks at the machine anew."""
ANNOUNCE_DELAY_S = 0.05
"""Changes of one's own that come together are told together."""


class Daemon:
    """The parts of one run, joined."""

    def __init__(
        self, config: Config, paths: Paths, membership: Membership, hardware: str | None
    ) -> None:
        self._config = config
        self._membership = membership
        identity, authorities = membership.identity, membership.authorities
        site = Site(
            nodes=config.nodes,
            servers=config.servers,
            role=config.role,
            election_key=membership.election_key,
            hostname=label(socket.gethostname()),
            instance=secrets.token_hex(8),
            port=config.port,
            settle_s=config.settle_s,
            abandon_after_s=config.abandon_after_s,
            replace_after_s=config.replace_after_s,
            fixed_addresses=config.fixed_addresses,
            machine=systemd.machine_mark(membership.site_id),
            hardware=hardware,
            tokenless=membership.tokenless,
        )
        durable = store.load(paths.state, identity.node)
        node: Node = machine.new_node(site, durable, time.monotonic())
        self.engine = Engine(node, paths.state, self)
        self._client = PeerClient(client_context(authorities, identity))
        self._links = Links(self.engine, self._client, config.abandon_after_s)
        self._receiver = Receiver(self.engine, self._links)
        self._server = PeerServer(
            server_context(authorities, identity),
            config.port,
            self._receiver,
            self._links.refused,
        )
        self._errands = Errands(paths, self._errand_ended)
        self.drive = Drive(self.engine, paths, membership.node_passwords, self._links.clocks)
        self._forget = Forget(self.engine, config, paths, membership)
        self._api_name = ApiName(mdns_name(membership.site_id))
        self._mdns = Mdns(
            node=identity.node,
            site_id=membership.site_id,
            accepted=membership.site_ids,
            port=config.port,
            api_name=self._api_name,
            on_target=lambda target: self._links.sighted(target, Source.MDNS),
            on_gone=lambda target: self._links.gone(target, Source.MDNS),
        )
        self._control = ControlServer(paths.control, self)
        self._pending_hello: asyncio.TimerHandle | None = None
        self._listening = False
        self._at: tuple[str | None, tuple[str, ...], bool] | None = None
        self._shown: str | None = None
        self._notes: list[str] = []
        self._hinted: asyncio.Task[None] | None = None
        self.engine.on_change = self._changed

    # --- effects ----------------------------------------------------------------------------

    def send(self, to: NodeId, message: Message) -> None:
        """Send to a peer."""
        self._links.send(to, message)

    def announce(self, hello: Hello) -> None:
        """Tell watchers, soon; at once while nobody can have asked yet."""
        if not self._listening:
            self._receiver.announce(hello)
            return
        if self._pending_hello is not None:
            self._pending_hello.cancel()
        self._pending_hello = asyncio.get_running_loop().call_later(
            ANNOUNCE_DELAY_S, self._receiver.announce, hello
        )

    def order(self, order: Order) -> None:
        """Ask root."""
        self.drive.order(order)

    def errand(self, errand: Errand) -> None:
        """Ask root to do something in the cluster's API."""
        self._errands.give(errand)

    async def _errand_ended(self, result: ErrandResult) -> None:
        await self.drive.look_at_facts()
        await self.engine.carry_out(ErrandEnded(now_s=time.monotonic(), result=result))

    def _changed(self) -> None:
        line = status.waiting_for(self.engine.node, time.monotonic())
        shown = f"{self.engine.node.phase}: waiting for {line}" if line else "ready"
        if shown != self._shown:
            self._shown = shown
            systemd.notify(STATUS=shown)
        if (notes := status.notes(self.engine.node, time.monotonic())) != self._notes:
            self._notes = notes
            for note in notes:
                log.warning("%s", note)
        self.drive.wake()
        self._api_name.show(name_answer(self.engine.node))
        if self.engine.node.seal is not None and not self._hinted:
            self._hinted = asyncio.get_running_loop().create_task(self._mdns.hint(self._hints()))

    # --- answers ----------------------------------------------------------------------------

    async def status(self, after: int, wait_s: float) -> dict[str, Any]:
        """For ``k3sagentd status``."""
        await self.engine.changed(after, wait_s)
        node = self.engine.node
        document = view.as_json(node, time.monotonic())
        document["site"]["id"] = self._membership.site_id
        document["site"]["also"] = sorted(self._membership.site_ids - {self._membership.site_id})
        document["site"]["registration"] += self._by_name()
        document["node"]["notes"] += self._forget.notes()
        document["events"] = [
            {"number": number, "time": round(at, 3), "text": text}
            for number, at, text in self.engine.reports
        ]
        return {"rev": self.engine.revision, "status": document}

    def registration(self) -> dict[str, Any] | None:
        """For ``k3sagentd registration``."""
        node = self.engine.node
        role = k3s_role(node) or ServerOrAgent.AGENT
        answer = registration.registration(node, NodeId(""), role)
        if answer is None:
            return None
        plain: dict[str, Any] = schema.to_plain(answer)
        plain["servers"] += self._by_name()
        return plain

    def _by_name(self) -> list[str]:
        """The way in by mDNS, for people and never for joiners: not every machine resolves it."""
        live = live_servers(self.engine.node)
        return [url_of(mdns_name(self._membership.site_id))] if live else []

    async def force(self) -> str | None:
        """For ``k3sagentd cluster-init --force``."""
        if refused := guards.why_not_force(self.engine.node):
            return refused
        await self.engine.carry_out(InitForced(now_s=time.monotonic()))
        return None

    async def reread(self) -> str | None:
        """For ``k3sagentd repair-addresses``."""
        read = await self.drive.look_at_facts()
        return None if read else "the daemon cannot read the facts about this machine"

    async def leave(self, step: str) -> str | None:
        """For ``k3sagentd leave``."""
        wanted = LeaveStep(step)
        await self.engine.carry_out(LeaveAsked(now_s=time.monotonic(), step=wanted))
        while True:
            revision, leaving = self.engine.revision, self.engine.node.leaving
            if leaving is None or leaving.step is not wanted:
                return "another step of leaving was asked for meanwhile"
            if leaving.done:
                return None
            if leaving.refused is not None:
                return leaving.refused
            await self.engine.changed(revision, LEAVE_LOOK_S)

    # --- tasks ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until cancelled; a part that fails ends the whole."""
        run_engine = asyncio.create_task(self.engine.run())
        await self.engine.carry_out(Tick(now_s=time.monotonic()))
        try:
            await self.drive.look_at_facts()
            await self._look_at_address()
            await self._server.start()
            self._listening = True
            await self._control.start()
            systemd.notify(READY=1)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_forever(run_engine))
                tasks.create_task(self.drive.run())
                tasks.create_task(self._errands.run())
                tasks.create_task(self._follow_addresses())
                tasks.create_task(_watchdog())
                tasks.create_task(self._forget.run())
                for seed in self._config.seeds:
                    tasks.create_task(
                        seeds.follow(
                            seed,
                            self._config.port,
                            lambda target: self._links.sighted(target, Source.SEED),
                        )
                    )
        finally:
            systemd.notify(STOPPING=1)
            run_engine.cancel()
            await self._control.stop()
            await self._mdns.detach()
            await self._links.close()
            await self._server.stop()
            await self._client.close()

    async def _look_at_address(self) -> addresses.Attachment | None:
        found = addresses.attachment(self._config.interface, self._config.virtual_ip)
        address = found.address if found else None
        also = tuple(each for each in addresses.present() if each != address)
        carrier = found is not None and addresses.has_carrier(found.interface)
        if (address, also, carrier) != self._at:
            self._at = (address, also, carrier)
            changed = AddressChanged(
                now_s=time.monotonic(), address=address, carrier=carrier, also=also
            )
            await self.engine.carry_out(changed)
        return found

    async def _follow_addresses(self) -> None:
        attached: addresses.Attachment | None = None
        async for _ in addresses.changes():
            found = await self._look_at_address()
            if found == attached:
                continue
            attached = found
            if found is None:
                await self._mdns.detach()
                continue
            try:
                await self._mdns.attach(found, self._hints())
            except OSError as error:
                # An address that goes as fast as it came; its change wakes us again.
                log.warning("mDNS on %s: %s", found.address, error.strerror)
                attached = None

    def _hints(self) -> dict[str, str]:
        return {"state": "sealed" if self.engine.node.seal else "forming"}


def label(hostname: str) -> str:
    """The host's own name as Kubernetes takes it: one label of RFC 1123."""
    text = re.sub(r"[^a-z0-9-]+", "-", hostname.split(".")[0].lower()).strip("-")
    return text[:63].rstrip("-") or "node"


async def _forever(task: asyncio.Task[None]) -> None:
    await task


async def _watchdog() -> None:
    period_s = systemd.watchdog_s()
    while period_s is not None:
        systemd.notify(WATCHDOG=1)
        await asyncio.sleep(period_s)


async def _facts(paths: Paths) -> MachineFacts:
    """Wait until root has looked at this machine: the identity hangs on the hardware.

    Raises MachineError.
    """
    deadline_s = time.monotonic() + FACTS_LIMIT_S
    said = False
    while (found := read_facts(paths)) is None:
        if not said:
            log.info("waiting for the facts about this machine (%s)", paths.facts)
            systemd.notify(READY=1, STATUS="waiting for the facts about this machine")
            said = True
        if time.monotonic() >= deadline_s:
            raise MachineError(
                f"{paths.facts} is not there after {FACTS_LIMIT_S:.0f} s; k3sagentd facts, run as "
                "root, writes it or says why it cannot"
            )
        await asyncio.sleep(FACTS_POLL_S)
    return found


async def main(
    config: Config, tokens: Tokens | None, keys: tuple[SiteKeys, ...], paths: Paths
) -> None:
    """Run the daemon until SIGTERM or SIGINT; raises K3sagentdError.

    ``keys`` are those of ``tokens.accepted``. Without tokens: with what was kept of one.
    """
    this = asyncio.current_task()
    assert this is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, this.cancel)
    hardware = (await _facts(paths)).hardware
    if tokens is None:
        membership = from_kept(paths.state, hardware)
    else:
        membership = from_tokens(tokens, keys, paths.state, hardware)
    node = membership.identity.node
    log.info("node %s of site %s, pid %d", node, membership.site_id, os.getpid())
    with contextlib.suppress(asyncio.CancelledError):
        await Daemon(config, paths, membership, mark_of(hardware)).run()
