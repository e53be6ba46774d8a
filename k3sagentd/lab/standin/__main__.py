# SPDX-License-Identifier: Apache-2.0
"""``k3s server|agent|kubectl|token|--version``, as far as machines that come and go need them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from k3sagentd.lab.standin import agent, kubectl, server
from k3sagentd.lab.standin.client import ServerClient, ServerError
from k3sagentd.lab.standin.options import Options, fatal, knobs, load
from k3sagentd.paths import Paths

USAGE = """\
usage: k3s server [--cluster-reset] [--OPTION=VALUE]…
       k3s agent [--OPTION=VALUE]…
       k3s kubectl …
       k3s token rotate [--token TOKEN] [--server URL] --new-token NEW
       k3s --version"""
LOCAL = "https://127.0.0.1:6443"
PROPAGATION_S = 1.0
"""pkg/cli/token/token.go: etcd db propagation delay."""


def main(arguments: list[str]) -> int:
    """Do what ``k3s`` would."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    paths = Paths()
    match arguments:
        case ["kubectl", *rest]:
            return kubectl.main(rest, paths.k3s_data / "server/tls")
        case ["--version" | "-v"]:
            print(f"k3s version {knobs().version} (5a7d1ab0)\ngo version go1.24.5")
            return 0
        case ["token", "rotate", *rest]:
            return _rotate(load(rest), paths)
        case ["server" | "agent" as role, *rest]:
            if message := knobs().fail:
                fatal(message)
            start = server.main if role == "server" else agent.main
            return start(load(rest), knobs(), paths.k3s_data)
        case _:
            print(USAGE, file=sys.stderr)
            return 64


def _rotate(options: Options, paths: Paths) -> int:
    """Give the cluster another server token (pkg/cli/token/token.go, Rotate)."""
    print(
        "\033[33mWARNING\033[0m: Recommended to keep a record of the old token. If restoring from "
        "a snapshot, you must use the token associated with that snapshot."
    )
    try:
        token = options.token or (paths.k3s_data / "server/token").read_text().strip()
        client = ServerClient(options.server or LOCAL, token, "server")
        body = {"newToken": options.values.get("new-token") or ""}
        asyncio.run(client.ask("PUT", "/v1-k3s/token", body))
    except (ServerError, OSError) as error:
        fatal(str(error))
    time.sleep(PROPAGATION_S)
    print("Token rotated, restart k3s nodes with new token")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
