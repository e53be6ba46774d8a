# SPDX-License-Identifier: Apache-2.0
"""Two minutes of bad weather over real daemons; ``make chaos`` has as many as one likes."""

import os
import time

from tests.lab import chaos
from tests.lab.conftest import Bench

MINUTES = float(os.environ.get("CHAOS_MINUTES", "2"))


def test_one_cluster_after_a_storm(lab: Bench) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    print(chaos.run(MINUTES, seed))
