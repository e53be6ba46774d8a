# SPDX-License-Identifier: Apache-2.0
"""The site's other servers, as this machine's daemon hears them: who is ready, and whether the
cluster may be alive without this server. Pure.

Only what a server says itself is believed of it. One that is heard and not ready may only be
starting, which takes K3s minutes on a Pi, and after a reset it is a cluster all by itself. So it is
harmless while it says that etcd knows it by another address, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k3sagentd.core.hello import url_of
from k3sagentd.errors import UnavailableError
from k3sagentd.k3s.quorum import quorum

Row = Mapping[str, Any]
"""A line of ``status.nodes``."""
LOST = "«etcd lost its quorum» in /usr/share/doc/k3sagentd/operations.md"


def ready(status: Mapping[str, Any]) -> list[str]:
    """The registration addresses of the servers that are ready now."""
    found = [row for row in _heard(status) if row["role"] == "server" and row["phase"] == "ready"]
    return [url_of(row["address"]) for row in found if row["address"]]


def silent(status: Mapping[str, Any]) -> list[str]:
    """The servers that are not heard, as people know them."""
    lost = [_name(row) for row in _others(status) if row["age_s"] > 0]
    unknown = _total(status) - 1 - len(_others(status))
    return lost + ([f"{unknown} of which nothing is known"] if unknown > 0 else [])


def check_gone(status: Mapping[str, Any]) -> None:
    """Return where the cluster is not, and cannot become, alive without this server.

    Raises UnavailableError, which says who may be it and what to do about that.
    """
    site = status["site"]
    if site["phase"] != "sealed":
        raise UnavailableError(f"the site is {site['phase']}, not sealed")
    if urls := ready(status):
        raise UnavailableError(f"{urls[0]} is ready now; run this again, to join it")
    starting = [_name(row) for row in _heard(status) if not row.get("moved")]
    unheard = _total(status) - 1 - len(_heard(status))
    if not starting and unheard < quorum(_total(status)):
        return
    said = ["no server is ready, but the cluster may be alive without this one"]
    if starting:
        said.append(
            f"Perhaps only starting: {', '.join(starting)}. Wait until one is ready, and run this "
            "again; where a repair was begun, finish it there; what cannot become ready, power off"
        )
    if unheard:
        said.append(
            f"Not heard: {', '.join(silent(status))}. Power them on, or mend the network; what is "
            f"gone for good: {LOST}"
        )
    raise UnavailableError(". ".join(said))


def _others(status: Mapping[str, Any]) -> Sequence[Row]:
    """Who is, or was when it was last heard, a server or a member of etcd."""
    own = status["node"]["id"]
    rows: Sequence[Row] = status["nodes"]
    servers = [row for row in rows if row["role"] == "server" or row.get("member")]
    return [row for row in servers if row["id"] != own]


def _heard(status: Mapping[str, Any]) -> Sequence[Row]:
    return [row for row in _others(status) if row["age_s"] == 0]


def _total(status: Mapping[str, Any]) -> int:
    """How many members etcd may have, this one included."""
    site = status["site"]
    known = {status["node"]["id"], *(row["id"] for row in _others(status))}
    if site.get("roster") is None:
        return max(len(known), int(site["servers"]))
    return len(known | set(site["roster"]))


def _name(row: Row) -> str:
    return f"{row['name']} ({row['address'] or 'no address'})"
