# SPDX-License-Identifier: Apache-2.0
"""The two passwords of a server, and what binds the cluster's data to the first (K3S.md 2).

The users are ``server`` and ``node``. The bootstrap data in the store stands under a key that is
made of the server's password; it is what tells one token from another.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from k3sagentd.files import write_atomically
from k3sagentd.lab.standin.options import Options, fatal, password_of
from k3sagentd.lab.standin.store import Store

BOOTSTRAP = "/bootstrap/"
DIFFERENT = "bootstrap data already found and encrypted with different token"


def storage_key(password: str) -> str:
    """As K3s makes it (pkg/cluster/encrypt.go)."""
    return BOOTSTRAP + hashlib.sha256(password.encode()).hexdigest()[:12]


class Tokens:
    """What this server takes as passwords, until it is started again."""

    def __init__(self, options: Options, data: Path) -> None:
        self._data = data
        self._seal = data / "token-hash"
        self.token = options.token or self._stored()
        self._agent_token = options.agent_token
        server = password_of(self.token)
        self._passwords = {"server": server, "node": self._agent_token or server}

    def _stored(self) -> str:
        try:
            return (self._data / "token").read_text().strip()
        except FileNotFoundError:
            return secrets.token_hex(16)

    @property
    def node_token(self) -> str:
        """With which this server speaks as a node."""
        return self._agent_token or self.token

    def user(self, name: str, password: str) -> bool:
        """Whether that is the user's password."""
        wanted = self._passwords.get(name)
        return wanted is not None and hmac.compare_digest(wanted.encode(), password.encode())

    # --- on the disk ------------------------------------------------------------------------

    def write(self) -> None:
        """The token files, in the secure form; only a set agent token has one (K3S.md 2)."""
        ca = hashlib.sha256((self._data / "tls/server-ca.crt").read_bytes()).hexdigest()
        files = {"token": f"K10{ca}::server:{self._passwords['server']}\n"}
        if self._agent_token:
            files["agent-token"] = f"K10{ca}::node:{self._agent_token}\n"
        for name, text in files.items():
            write_atomically(self._data / name, text.encode(), mode=0o600)
        link = self._data / "node-token"
        if not link.is_symlink():
            link.symlink_to(self._data / "token")

    def check_local(self) -> None:
        """Data of another token, as this machine's copy knows it, is not opened."""
        if self._seal.exists() and self._seal.read_text() != self._key():
            fatal(f"Failed to reconcile with temporary etcd: {DIFFERENT}")

    def _key(self) -> str:
        return storage_key(self._passwords["server"])

    # --- in the store -----------------------------------------------------------------------

    async def check(self, store: Store) -> None:
        """Save the bootstrap data, unless they are there; under another token that ends K3s."""
        found = [each.key for each in (await store.list(BOOTSTRAP)).entries]
        if not found:
            await store.put(self._key(), "sealed", revision=0)
        elif self._key() not in found:
            fatal(DIFFERENT)
        self._seal.write_text(self._key())

    async def follow(self, store: Store) -> None:
        """Note locally what the store says, as this machine's copy of it does."""
        found = [each.key for each in (await store.list(BOOTSTRAP)).entries]
        if found and self._seal.read_text() not in found:
            write_atomically(self._seal, found[0].encode())

    async def rotate(self, store: Store, new: str) -> None:
        """A new server token (pkg/server/handlers/token.go); other servers go on with the old one
        until they are started with the new."""
        old, self._passwords["server"] = self._key(), new or secrets.token_hex(16)
        if not self._agent_token:
            self._passwords["node"] = self._passwords["server"]
        self.write()
        await store.put(self._key(), "sealed")
        if old != self._key():
            await store.delete(old)
        self._seal.write_text(self._key())
