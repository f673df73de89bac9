"""What calls a program's function for ``program_tests``: the text of this file is the driver in the sandbox.

It shares a process with the program, which may therefore change what it does. That gains nothing: all that leaves the
process are values, and what they should be is not known there. It uses the standard library alone.
"""

from collections.abc import Callable, ItemsView, KeysView
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from typing import Any

LONGEST_INT, LONGEST_TEXT = 13_000, 10_000  # bits and characters of what is not digested


def call(program: dict[str, Any], how: str, *arguments: Any) -> Any:
    """``how``: the name of one of the three functions below."""
    known: dict[str, Callable[..., Any]] = {"of_arguments": of_arguments, "of_text": of_text, "digest": digest}
    return known[how](program, *arguments)


def of_arguments(program: dict[str, Any], name: str, arguments: list[Any], named: dict[str, Any]) -> list[Any]:
    return answer(program[name](*arguments, **named))


def of_text(program: dict[str, Any], setup: str, text: str) -> list[Any]:
    """The value of an expression where the program's names are, after the statements ``setup``."""
    exec(setup, program)
    return answer(eval(text, program))


def answer(value: Any) -> list[Any]:
    """``["value", the value as a plain one]``, or of a type that has none ``["truth", whether it counts as true]``."""
    try:
        return ["value", plain(value)]
    except (TypeError, RecursionError):
        return ["truth", bool(value)]


def digest(program: dict[str, Any], name: str, whether_any: bool, arguments: list[Any]) -> Any:
    """The plain value, with long texts and integers as digests: on both sides of a comparison alike. ``whether_any``:
    of a value that is no bool only whether it is not None."""
    value = program[name](*arguments)
    return value is not None if whether_any and type(value) is not bool else plain(value, short=True)


def plain(value: Any, short: bool = False) -> Any:
    """The value of a builtin type that equals ``value``, which may be of a subclass (Counter, namedtuple, IntEnum).

    It is what the builtin type holds, whatever the subclass says of itself. Raises TypeError for another type.
    """
    kind = type(value)
    if value is None or kind in (bool, Fraction, Decimal):
        return value
    if issubclass(kind, int):
        number = int.__int__(value)
        return _hash(hex(number)) if short and number.bit_length() > LONGEST_INT else number
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, complex):
        return complex.__complex__(value)
    if issubclass(kind, str):
        text = str.__str__(value)
        return _hash(ascii(text)) if short and len(text) > LONGEST_TEXT else text
    if issubclass(kind, (bytes, bytearray)):
        return bytes(value)
    if issubclass(kind, dict):
        return {plain(key, short): plain(item, short) for key, item in dict.items(value)}
    for base in (list, tuple, set, frozenset):
        if issubclass(kind, base):
            return base(plain(item, short) for item in base.__iter__(value))
    if issubclass(kind, (KeysView, ItemsView)):
        return {plain(item, short) for item in value}
    raise TypeError(f"{kind.__name__} has no plain value")


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
