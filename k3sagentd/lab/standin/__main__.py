# SPDX-License-Identifier: Apache-2.0
"""``k3s server|agent``, ``k3s --version``, and ``k3s kubectl get nodes`` on a server."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from k3sagentd.lab.standin import agent, server
from k3sagentd.lab.standin.client import ServerClient, ServerError
from k3sagentd.lab.standin.options import fatal, knobs, load
from k3sagentd.paths import Paths


def _get_nodes(data_token: str) -> int:
    client = ServerClient("https://127.0.0.1:6443", data_token, "node")
    try:
        nodes = json.loads(asyncio.run(client.ask("GET", "/v1-k3s/standin/nodes")))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'NAME':<28}{'ROLES':<16}INTERNAL-IP")
    for node in sorted(nodes, key=lambda each: each["name"]):
        role = "control-plane" if node["role"] == "control-plane" else "<none>"
        print(f"{node['name']:<28}{role:<16}{node['ip']}")
    return 0


def main(arguments: list[str]) -> int:
    """Do what ``k3s`` would."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    options, paths = load(), Paths()
    match arguments:
        case ["kubectl", "get", "nodes"]:
            return _get_nodes(options.token or "")
        case ["--version"]:
            print(f"k3s version {knobs().version} (standin)")
            return 0
        case ["server" | "agent" as role]:
            if message := knobs().fail:
                fatal(message)
            start = server.main if role == "server" else agent.main
            return start(options, knobs(), paths.k3s_data)
        case _:
            print("usage: k3s server | agent | --version | kubectl get nodes", file=sys.stderr)
            return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
