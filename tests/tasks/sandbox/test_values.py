"""Values as JSON: there and back, and what is refused."""

import json
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from tasks.sandbox.run import Failed, same
from tasks.sandbox.values import DEEPEST, ROOM, decode, encode

PRIME = 2**61 - 1
VALUES: list[Any] = [
    None, True, 0, -(2**80), 10**3000, 10**9999, -(10**9999), 1.5, float("inf"), -0.0, "é\0\ud800", b"", b"\0\xff",
    2j, [], [[1]], (), (1, (2,)), {}, {1: {2: 3}}, {(1, "a"): [None]}, set(), {1, "1"}, frozenset({(1,)}),
    {frozenset({1}): {2}}, Fraction(-3, 7), Decimal("1.50"), Decimal("1E+400"), {Fraction(1, 2), Decimal(3)},
]  # fmt: skip


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_come_back_as_they_were(value: Any) -> None:
    text = json.dumps(encode(value))
    assert same(decode(json.loads(text)), value) and same(decode(json.loads(text), len(text)), value)


class Integer(int):
    pass


@pytest.mark.parametrize(
    "value",
    [Integer(1), object(), [object()], {1: int}, range(3), iter([]), nested(DEEPEST + 2), Fraction(10**4000, 7)],
)
def test_what_has_no_form_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        encode(value)


def test_what_came_back_can_be_sent_within_something_else() -> None:
    deepest = decode(encode(nested(DEEPEST)), 1000)
    assert decode(encode([[[deepest]]], -ROOM)) == [[[deepest]]]
    with pytest.raises(ValueError, match="levels"):
        decode(encode(nested(DEEPEST + 4), -ROOM), 1000)


@pytest.mark.parametrize(
    "keys",
    [
        [i * PRIME for i in range(20_000)],
        [i if i % 2 else i * PRIME for i in range(20_000)],
        [{"tuple": [i * PRIME, 1]} for i in range(20_000)],
        [{"fraction": [i * PRIME, 1]} for i in range(20_000)],
    ],
    ids=["all", "half", "tuples", "fractions"],
)
def test_keys_that_share_a_hash_are_given_up_soon(keys: list[Any]) -> None:
    for form in ({"set": keys}, {"frozenset": keys}, {"dict": [[key, 0] for key in keys]}):
        size, started = len(json.dumps(form)), time.thread_time()
        with pytest.raises(ValueError, match="share"):
            decode(form, size)
        assert time.thread_time() - started < 1.0


def test_many_honest_keys_are_read() -> None:
    for value in (set(range(200_000)), {str(i): i for i in range(100_000)}, {(i, -i) for i in range(50_000)}):
        form = encode(value)
        assert decode(form, len(json.dumps(form))) == value


def test_sets_of_another_size_are_told_apart_at_once() -> None:
    started = time.thread_time()
    assert not same({i * PRIME for i in range(2000)}, {1, 2})
    assert not same({1, 2}, {True, 2}) and not same({1: 2}, {True: 2}) and same({1: {2}}, {1: {2}})
    assert time.thread_time() - started < 1.0


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(True, 1), (1, 1.0), ((1,), [1]), ([True], [1]), ({1: 2}, {True: 2}), ({"a": 1}, {"a": 1.0}),
     ({1}, {True}), ("1", 1), ([1, 2], [2, 1]), ([1], [1, 1]), (Failed("x"), Failed("x")), (None, 0),
     (b"1", "1"), (Fraction(1), 1), (Decimal(1), 1), ({1, 2}, {1}), ({1}, {1, 2}), ({1: 2, 2: 2}, {1: 2})],
)  # fmt: skip
def test_equal_is_not_the_same(actual: object, expected: object) -> None:
    assert not same(actual, expected)
    assert expected is None or isinstance(expected, Failed) or same(expected, expected)


def test_order_of_dicts_does_not_count_but_their_values_do() -> None:
    assert same({"a": [1], "b": 2}, {"b": 2, "a": [1]})
    assert not same({"a": [1], "b": 2}, {"b": 2, "a": [2]})
