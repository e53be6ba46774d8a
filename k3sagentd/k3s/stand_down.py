# SPDX-License-Identifier: Apache-2.0
"""Root's order STAND_DOWN: the cluster that an abandoned epoch began here goes aside."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from k3sagentd.core.k3s import Datastore
from k3sagentd.errors import HopelessError
from k3sagentd.k3s import dropin, keepalived
from k3sagentd.k3s.data import Marker, datastore, put_aside, read_marker
from k3sagentd.k3s.ownership import is_adopted
from k3sagentd.k3s.work import Work

log = logging.getLogger(__name__)


def stand_down(work: Work) -> Iterator[str]:
    """Stop K3s and put its data aside, if an order of that epoch made it."""
    yield "check whose data it is"
    if not _is_ours(work):
        return
    yield "stop K3s"
    work.install.stop()
    yield "move its data aside"
    data = work.paths.k3s_data
    origin = read_marker(data)
    if origin is not None and origin.is_by(work.order.node):
        put_aside(data, f"{data.name}.abandoned-{work.order.epoch}")
    for path in (work.paths.dropin, work.paths.k3s_token, work.paths.k3s_agent_token):
        path.unlink(missing_ok=True)
    keepalived.withdraw(work.config, work.paths)


def _is_ours(work: Work) -> bool:
    """Whether the data was made by our order; what was there before us stays as it is.

    Done, not failed, in that case: a node with such a cluster may be nominated for it again.
    """
    data, has_data = work.paths.k3s_data, datastore(work.paths.k3s_data) is not Datastore.NONE
    origin, asked = read_marker(data), asked_for(work)
    if origin is None or not origin.is_by(work.order.node):
        if has_data:
            whose = f" ({origin.describe()} of node {origin.node})" if origin else ""
            log.warning("%s was there before this node%s and stays as it is", data, whose)
        return not has_data
    if origin != asked:
        raise HopelessError(f"{data} is of {origin.describe()}, not of {asked.describe()}")
    if has_data:
        _check_alone(work)
    return True


def _check_alone(work: Work) -> None:
    """Raise HopelessError where what is on the disk contradicts the marker: no abandoned epoch has
    a cluster that others are in, or K3s that our install did not begin."""
    data, paths = work.paths.k3s_data, work.paths
    if is_adopted(paths, work.config):
        raise HopelessError(f"K3s here was not installed by k3sagentd; {data} stays as it is")
    if server := dropin.present(paths).get("server"):
        raise HopelessError(
            f"{paths.dropin} says that K3s here is in the cluster of {server}; {data} stays as it "
            "is"
        )


def asked_for(work: Work) -> Marker:
    """What the order has made, or would make."""
    order = work.order
    return Marker(epoch=order.epoch, generation=order.generation, node=order.node)
