# SPDX-License-Identifier: Apache-2.0
"""Root's order STAND_DOWN: the cluster that an abandoned epoch began here goes aside."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from k3sagentd.core.k3s import Datastore
from k3sagentd.errors import HopelessError
from k3sagentd.k3s import keepalived
from k3sagentd.k3s.data import Marker, datastore, put_aside, read_marker
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
    if read_marker(data) is not None:
        put_aside(data, f"{data.name}.abandoned-{work.order.epoch}")
    for path in (work.paths.dropin, work.paths.k3s_token, work.paths.k3s_agent_token):
        path.unlink(missing_ok=True)
    keepalived.withdraw(work.config, work.paths)


def _is_ours(work: Work) -> bool:
    """Whether the data was made by our order; what was there before us stays as it is."""
    data = work.paths.k3s_data
    origin, asked = read_marker(data), asked_for(work)
    if origin is not None and origin != asked:
        raise HopelessError(f"{data} is of {origin.describe()}, not of {asked.describe()}")
    if origin is None and datastore(data) is not Datastore.NONE:
        log.warning("%s was there before the site and stays as it is", data)
        return False
    return True


def asked_for(work: Work) -> Marker:
    """The epoch that the order is of."""
    return Marker(epoch=work.order.epoch, generation=work.order.generation)
