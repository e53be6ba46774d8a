# SPDX-License-Identifier: Apache-2.0
"""What a campaign of runs must have exercised: each transition, each event and message, each fault.

A simulator that never comes somewhere proves nothing about it. What cannot be come to is named
here with its reason, and the campaign fails as well if it is come to after all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from k3sagentd.core.events import Event
from k3sagentd.core.lifecycle import TABLE, Rule
from k3sagentd.core.messages import Message
from k3sagentd.core.words import NodePhase
from tests.sim.dice import Fault

RUNS_FOR_ALL = 20_000
"""A campaign of so many runs must have been everywhere."""

BEYOND_REACH = {
    "electing -> standing-down": "who started an epoch that was abandoned stands down at once",
    "waiting -> standing-down": "as above",
    "ready -> discovering": "who is ready has data, and follows no other start",
}
NOT_FED = {
    "InitForced": "an operator's word: counted as a fault, and in the scenario files",
    "LeaveAsked": "an operator's word, in the scenario files",
    "MessageReceived": "counted as its message",
}


def name_of(phase: NodePhase, rule: Rule) -> str:
    """A transition as the core reports it."""
    return f"{phase} -> {rule.next}: {rule.why}"


def transitions() -> dict[str, str]:
    """Each transition of the table, with its short form."""
    return {
        name_of(phase, rule): f"{phase} -> {rule.next}" for rule in TABLE for phase in rule.phases
    }


def inputs() -> set[str]:
    """The kinds of events and messages that the core takes."""
    kinds = {kind.__name__ for kind in (*get_args(Event), *get_args(Message))}
    return kinds - set(NOT_FED)


def gaps(
    seen: Counter[str], fed: Counter[str], faults: Counter[Fault], *, all_of_it: bool
) -> Iterator[str]:
    """What is missing, or was come to and should not be; without ``all_of_it`` only that."""
    for name, short in transitions().items():
        if short in BEYOND_REACH and seen[name]:
            yield f"transition {name} is said to be beyond reach"
        if all_of_it and short not in BEYOND_REACH and not seen[name]:
            yield f"transition {name} was never taken"
    if all_of_it:
        yield from (f"{kind} was never fed" for kind in sorted(inputs()) if not fed[kind])
        yield from (f"no {fault}" for fault in Fault if not faults[fault])
