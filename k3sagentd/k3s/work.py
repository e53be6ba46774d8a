# SPDX-License-Identifier: Apache-2.0
"""One order, and what carrying it out needs: handed to each step."""

from __future__ import annotations

from dataclasses import dataclass

from k3sagentd.config import Config
from k3sagentd.core.k3s import Order
from k3sagentd.k3s.install import Method
from k3sagentd.paths import Paths
from k3sagentd.site_token import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What root was asked for, and how this machine is set up."""

    order: Order
    config: Config
    paths: Paths
    tokens: Tokens | None
    """None on an agent that forgot the site's (``forget-token``)."""
    install: Method
