# SPDX-License-Identifier: Apache-2.0
"""Every path that the project reads or writes, below one root so that tests can move it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Paths:
    """The paths of one machine; ``root`` is ``/`` except in tests."""

    root: Path = Path("/")

    def _at(self, path: str) -> Path:
        return self.root / path

    @property
    def config(self) -> Path:
        """The configuration; drop-ins are in ``config.yaml.d`` beside it."""
        return self._at("etc/k3sagentd/config.yaml")

    @property
    def token(self) -> Path:
        """The token, where ``token-file`` does not say otherwise."""
        return self._at("etc/k3sagentd/token")

    @property
    def token_forgotten(self) -> Path:
        """Root's note that this machine had a token and was told to forget it."""
        return self._at("etc/k3sagentd/token.forgotten")

    @property
    def state(self) -> Path:
        """Identity and votes: what must survive."""
        return self._at("var/lib/k3sagentd")

    @property
    def run(self) -> Path:
        """What is gone at the next boot."""
        return self._at("run/k3sagentd")

    @property
    def order(self) -> Path:
        """From the daemon to root."""
        return self.run / "order.json"

    @property
    def result(self) -> Path:
        """From root to the daemon: how far the order is."""
        return self.run / "result.json"

    @property
    def errand(self) -> Path:
        """From the daemon to root: what to do in the cluster's API."""
        return self.run / "errand.json"

    @property
    def errand_result(self) -> Path:
        """From root to the daemon: what became of it, and what root saw."""
        return self.run / "errand-result.json"

    @property
    def forget(self) -> Path:
        """From the daemon to root: the token may be wiped."""
        return self.run / "forget"

    @property
    def forget_result(self) -> Path:
        """From root to the daemon: why it was not."""
        return self.run / "forget-result"

    @property
    def facts(self) -> Path:
        """From root to the daemon: what is on this machine."""
        return self.run / "facts.json"

    @property
    def control(self) -> Path:
        """The daemon's own socket, for the commands."""
        return self.run / "control.sock"

    @property
    def root_run(self) -> Path:
        """As ``run``, but root's own: the daemon cannot put links here."""
        return self._at("run/k3sagentd-apply")

    @property
    def root_state(self) -> Path:
        """As ``state``, but root's own."""
        return self._at("var/lib/k3sagentd-apply")

    @property
    def apply_lock(self) -> Path:
        """Held while an order is carried out."""
        return self.root_run / "lock"

    @property
    def command_lock(self) -> Path:
        """Held by a command of the operator from before its question to its end."""
        return self.root_run / "command.lock"

    @property
    def supervisor(self) -> Path:
        """Pid, lock and command of a K3s that we supervise (install method ``exec``)."""
        return self.root_run / "k3s-exec.json"

    @property
    def installed(self) -> Path:
        """There once our install has begun: a K3s without it is somebody else's."""
        return self.root_state / "installed.json"

    @property
    def unstarted(self) -> Path:
        """There from our run of K3s's install script, or our stop of the old role, to the start
        that follows: the roles that are owed one."""
        return self.root_state / "unstarted"

    @property
    def left(self) -> Path:
        """There on a machine that has left its site, or is being reset: the daemon does not run."""
        return self._at("etc/k3sagentd/left")

    @property
    def underway(self) -> Path:
        """How far a command of the operator is that must be finished before any other order."""
        return self.root_state / "underway.json"

    @property
    def converting(self) -> Path:
        """There while K3s's SQLite data is being converted to etcd for us."""
        return self.root_state / "converting"

    @property
    def served(self) -> Path:
        """There once K3s was ready here as a member of etcd that we set up (systemd/after-k3s):
        without its data it founds no other cluster."""
        return self.root_state / "served"

    @property
    def restart(self) -> Path:
        """There from a change of K3s's configuration to the restart that it needs."""
        return self.root_run / "restart"

    @property
    def clock(self) -> Path:
        """From the daemon to root: what the peers' clocks say."""
        return self.run / "clock.json"

    @property
    def boot_partitions(self) -> tuple[Path, ...]:
        """Where a person who has only the card puts configuration and token."""
        return (self._at("boot/firmware/k3sagentd"), self._at("boot/k3sagentd"))

    @property
    def cmdlines(self) -> tuple[Path, ...]:
        """The kernel's command line on a Raspberry Pi: Debian 12 and later, and before."""
        return (self._at("boot/firmware/cmdline.txt"), self._at("boot/cmdline.txt"))

    @property
    def k3s_config(self) -> Path:
        """K3s's own configuration; its drop-ins are in ``config.yaml.d`` beside it."""
        return self._at("etc/rancher/k3s/config.yaml")

    @property
    def dropin(self) -> Path:
        """What we say to K3s."""
        return self._at("etc/rancher/k3s/config.yaml.d/50-k3sagentd.yaml")

    @property
    def k3s_token(self) -> Path:
        """The token in the form that K3s is given."""
        return self._at("etc/rancher/k3s/k3sagentd-token")

    @property
    def k3s_agent_token(self) -> Path:
        """The token by which a server of K3s takes agents in."""
        return self._at("etc/rancher/k3s/k3sagentd-agent-token")

    @property
    def k3s_own_token(self) -> Path:
        """The server token as a running K3s server has it (K3S.md 2)."""
        return self.k3s_data / "server/token"

    @property
    def k3s_data(self) -> Path:
        """K3s's data directory."""
        return self._at("var/lib/rancher/k3s")

    @property
    def keepalived(self) -> Path:
        """keepalived's configuration; Debian's package ships none."""
        return self._at("etc/keepalived/keepalived.conf")

    @property
    def k3s_log(self) -> Path:
        """Output of a K3s that we supervise."""
        return self._at("var/log/k3s.log")
