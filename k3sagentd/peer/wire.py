# SPDX-License-Identifier: Apache-2.0
"""The JSON bodies of the peer API: what is sent on ``/v1/watch`` and ``/v1/exchange``.

Owns the protocol version and the limits of one body. A body that no correct peer of this
version sends raises PeerError. Within a version a later k3sagentd may send keys that an earlier
one passes over, for a site is upgraded machine by machine; what must not be passed over takes a
new version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from k3sagentd import schema
from k3sagentd.core.messages import Hello, Message
from k3sagentd.errors import DataError, PeerError

PROTOCOL_VERSION = 1
"""Machines whose versions differ do not talk."""
MESSAGES_LIMIT = 64
"""Messages in one exchange."""
WAIT_LIMIT_S = 300.0
"""How long a watch may be held."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    """I am so; answer when you are not what I know of you, at the latest after ``wait_s``."""

    version: int = PROTOCOL_VERSION
    hello: Hello
    known_instance: str | None = None
    known_revision: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchAnswer:
    """I am so."""

    version: int = PROTOCOL_VERSION
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Messages, in order; the request and the answer have the same form."""

    version: int = PROTOCOL_VERSION
    messages: tuple[Message, ...] = ()


def exchange(messages: Sequence[Message]) -> Exchange:
    """The body that carries ``messages``."""
    return Exchange(messages=tuple(messages))


def encode(body: WatchRequest | WatchAnswer | Exchange) -> dict[str, Any]:
    """The JSON object of a body."""
    plain: dict[str, Any] = schema.to_plain(body)
    return plain


def decode(kind: type[T], body: dict[str, Any]) -> T:
    """The body of a JSON object; raises PeerError."""
    version = body.get("version")
    if type(version) is int and version != PROTOCOL_VERSION:
        raise PeerError(
            f"it speaks version {version} of the peer protocol, this machine {PROTOCOL_VERSION}: "
            "install the same k3sagentd on both"
        )
    try:
        value: T = schema.from_plain(kind, body, newer=True)
    except DataError as error:
        raise PeerError(str(error)) from error
    if isinstance(value, Exchange) and len(value.messages) > MESSAGES_LIMIT:
        raise PeerError(f"{len(value.messages)} messages, at most {MESSAGES_LIMIT} are allowed")
    return value
