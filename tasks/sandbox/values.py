"""Values as JSON, between this process and the sandbox.

Both sides use it, and the other side imports nothing of the project beside this folder. What is decoded here may have
been written by a hostile program, so decoding is bounded in depth and, where a caller gives ``size``, in time.
"""

import time
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

DEEPEST = 200  # containers within one another of a value that comes back
ROOM = 8  # by how many more what goes in may be deeper: it may hold what came back
LONGEST_INT = 10_000  # bits that JSON shows in decimal; Python refuses to write much longer ones
FEW_KEYS = 64
START_SECONDS, SECONDS_PER_BYTE = 0.25, 3e-7


def encode(value: Any, depth: int = 0) -> Any:
    """JSON that keeps types that JSON has not: tuples, sets, bytes, complex numbers, fractions, decimals, and keys that
    are no strings.

    Types are compared exactly, so a subclass with its own ``__eq__`` or ``__repr__`` is never called. Raises TypeError
    for other types, for containers nested more than ``DEEPEST`` deep and for fractions of very long integers.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() <= LONGEST_INT else {"int": hex(value)}
    if depth > DEEPEST:
        raise TypeError(f"a value of more than {DEEPEST} levels")
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind is dict:
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is Fraction and max(value.numerator.bit_length(), value.denominator.bit_length()) <= LONGEST_INT:
        return {"fraction": [value.numerator, value.denominator]}
    if kind is Decimal:
        return {"decimal": str(value)}
    raise TypeError("a value of a type that is not compared")


def decode(value: Any, size: int | None = None) -> Any:
    """The inverse of ``encode``.

    ``size``: length in bytes of the JSON, from which follows how much CPU time is taken at most: keys that were chosen
    to share their places in a table make a set of n of them take n*n steps. Raises ValueError, TypeError, KeyError,
    AttributeError or ArithmeticError for what ``encode`` does not write, and ValueError where it takes too long.
    """
    if size is None:
        return _decode(value, float("inf"), -ROOM)
    return _decode(value, time.thread_time() + START_SECONDS + SECONDS_PER_BYTE * size, 0)


def _decode(value: Any, latest: float, depth: int) -> Any:
    if not isinstance(value, (list, dict)):
        return value
    if depth > DEEPEST:
        raise ValueError(f"a value of more than {DEEPEST} levels")
    if isinstance(value, list):
        return [_decode(item, latest, depth + 1) for item in value]
    ((kind, parts),) = value.items()
    if kind == "int":
        return int(parts, 16)
    if kind == "bytes":
        return bytes.fromhex(parts)
    if kind == "decimal":
        return Decimal(parts)
    if kind == "fraction":
        numerator, denominator = parts
        if max(numerator.bit_length(), denominator.bit_length()) > LONGEST_INT:
            raise ValueError("a fraction of long integers, which takes long to shorten")
        return Fraction(numerator, denominator)
    if kind == "dict":
        keys = [_decode(key, latest, depth + 1) for key, _ in parts]
        return _table(zip(keys, [_decode(item, latest, depth + 1) for _, item in parts], strict=True), latest)
    items = [_decode(item, latest, depth + 1) for item in parts]
    if kind == "tuple":
        return tuple(items)
    if kind == "complex":
        real, imaginary = items
        return complex(real, imaginary)
    return {"set": set, "frozenset": frozenset}[kind](_table(((item, None) for item in items), latest))


def _table(pairs: Iterable[tuple[Any, Any]], latest: float) -> dict[Any, Any]:
    """A dict, filled with an eye on the thread's clock."""
    table = {}
    for count, (key, item) in enumerate(pairs, 1):
        table[key] = item
        if count % FEW_KEYS == 0 and time.thread_time() > latest:
            raise ValueError("keys that share their places")
    return table
