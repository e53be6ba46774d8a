# SPDX-License-Identifier: Apache-2.0
"""What is read from outside: one form, and refusals that say where and forge nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from k3sagentd import schema
from k3sagentd.errors import DataError

FORGED = "x\nAccepted: an order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """As an order is made."""

    count: int = 0
    share: float = 0.0
    texts: Mapping[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    "plain",
    [
        {FORGED: 1},
        {"type": FORGED},
        {"type": [FORGED]},
        {"count": FORGED},
        {"texts": {FORGED: 1}},
        {"texts": {"x": [FORGED * 99]}},
    ],
)
def test_a_refusal_is_one_short_line(plain: dict) -> None:
    with pytest.raises(DataError) as caught:
        schema.loads(Thing, schema.dumps(plain))
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 160


@pytest.mark.parametrize("text", ["1e999", "-1e999"])
def test_numbers_of_any_size_are_numbers(text: str) -> None:
    assert abs(schema.loads(Thing, f'{{"share": {text}}}').share) == float("inf")


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_that_does_not_fit_is_refused(digits: int) -> None:
    with pytest.raises(DataError):
        schema.loads(Thing, f'{{"share": {"9" * digits}}}')


def test_any_depth_is_refused() -> None:
    for depth in (*range(100, 1200, 7), 100_000):
        with pytest.raises(DataError):
            schema.loads(Thing, '{"count": ' + "[" * depth + "]" * depth + "}")


def test_keys_of_a_later_version_are_passed_over_only_where_one_may_speak() -> None:
    plain = {"type": "Thing", "count": 7, "colour": "red"}
    assert schema.from_plain(Thing, plain, newer=True) == Thing(count=7)
    with pytest.raises(DataError, match="unknown key 'colour'"):
        schema.from_plain(Thing, plain)
