# SPDX-License-Identifier: Apache-2.0
"""Bodies of the peer API between machines that do not have the same k3sagentd."""

import pytest

from k3sagentd.core.messages import Fetch
from k3sagentd.errors import PeerError
from k3sagentd.peer import wire


def test_what_a_later_one_adds_is_passed_over() -> None:
    body = wire.encode(wire.exchange([Fetch(first=3)]))
    body["colour"] = "red"
    body["messages"][0]["shape"] = {"round": True}
    assert wire.decode(wire.Exchange, body) == wire.exchange([Fetch(first=3)])


def test_another_version_is_refused_and_both_are_named() -> None:
    body = wire.encode(wire.exchange([])) | {"version": 2}
    with pytest.raises(PeerError, match="it speaks version 2 of the peer protocol, this machine 1"):
        wire.decode(wire.Exchange, body)


@pytest.mark.parametrize(
    "wrong", [{"version": "1"}, {"version": True}, {"messages": None}, {"messages": [{}]}]
)
def test_what_no_version_sends_is_refused(wrong: dict) -> None:
    with pytest.raises(PeerError):
        wire.decode(wire.Exchange, wire.encode(wire.exchange([])) | wrong)
