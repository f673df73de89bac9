"""The table of primitive operations that the code problems compose.

Values have five types, each named by the variable that holds it: ``n`` an int, ``s`` a string, ``xs`` a list
of ints, ``ws`` a list of strings, ``d`` a dict from strings to ints. In phrases and code ``@`` stands for the
constant. ``ref`` is written apart from ``code`` and in another way, so that each can check the other.
Every operation is total (empty inputs too), and none depends on the order of a dict, which JSON may lose.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

Constant = int | str | None


@dataclass(frozen=True)
class Primitive:
    """One step: ``code`` is an expression on the variable ``takes``, ``ref(value, constant)`` its value."""

    name: str
    takes: str
    gives: str
    phrases: tuple[str, ...]
    code: str
    ref: Callable[[Any, Any], Any]
    constants: tuple[Constant, ...] = (None,)

    def expression(self, constant: Constant) -> str:
        """The canonical code with the constant filled in."""
        return self.code.replace("@", str(constant))


NUM = tuple(range(1, 10))
BIG = tuple(range(2, 10))
FEW = (1, 2, 3, 4)
LETTER = tuple("abeorst")
MARK = ("-", "+", "/", "_")
VOWELS = frozenset("aeiou")


def _keep(test: Callable[[Any, Any], Any]) -> Callable[[Any, Any], list[Any]]:
    return lambda v, k: list(filter(lambda item: test(item, k), v))


def _each(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], list[Any]]:
    return lambda v, k: list(map(lambda item: change(item, k), v))


def _count(test: Callable[[Any, Any], Any]) -> Callable[[Any, Any], int]:
    return lambda v, k: len([1 for item in v if test(item, k)])


def _unique(v: list[Any], _: Constant) -> list[Any]:
    return [item for i, item in enumerate(v) if item not in v[:i]]


P = Primitive
# fmt: off
# One operation a line or two: a table, to be read as one.
INT = (
    P("add", "n", "n", ("add @", "increase it by @"), "n + @", lambda v, k: sum((v, k)), NUM),
    P("subtract", "n", "n", ("subtract @", "decrease it by @"), "n - @", lambda v, k: v + (-k), NUM),
    P("multiply", "n", "n", ("multiply by @", "multiply it by @"), "n * @", lambda v, k: math.prod((v, k)),
      BIG),
    P("modulo", "n", "n", ("take the remainder modulo @", "reduce it modulo @"), "n % @",
      lambda v, k: divmod(v, k)[1], BIG),
    P("floor_divide", "n", "n", ("floor divide by @", "divide it by @ rounding down"), "n // @",
      lambda v, k: divmod(v, k)[0], BIG),
    P("square", "n", "n", ("square it", "multiply it by itself"), "n * n", lambda v, k: pow(v, 2)),
    P("negate", "n", "n", ("negate it", "flip its sign"), "-n", lambda v, k: 0 - v),
    P("absolute", "n", "n", ("take the absolute value", "drop its sign"), "abs(n)", lambda v, k: max(v, -v)),
    P("at_least", "n", "n", ("raise it to at least @", "make it at least @"), "max(n, @)",
      lambda v, k: k if v < k else v, NUM),
    P("at_most", "n", "n", ("cap it at @", "make it at most @"), "min(n, @)", lambda v, k: v if v < k else k,
      NUM),
    P("digit_sum", "n", "n", ("take the sum of its digits", "add up its digits"),
      "sum(int(c) for c in str(abs(n)))", lambda v, k: sum(abs(v) // 10**i % 10 for i in range(9))),
    P("digit_count", "n", "n", ("take the number of digits", "count its digits"), "len(str(abs(n)))",
      lambda v, k: next(i for i in range(1, 20) if abs(v) < 10**i)),
    P("last_digit", "n", "n", ("take the last digit", "keep only its last digit"), "abs(n) % 10",
      lambda v, k: int(str(v)[-1])),
    P("reverse_digits", "n", "n", ("reverse its digits", "read its digits backwards"),
      "int(str(abs(n))[::-1])",
      lambda v, k: int("".join(reversed(str(v).lstrip("-"))))),
    P("digits", "n", "xs", ("list its digits", "split it into digits"), "[int(c) for c in str(abs(n))]",
      lambda v, k: list(map(int, str(v).lstrip("-")))),
    P("range", "n", "xs", ("count from 0 up to below it", "list the numbers from 0 to below it"),
      "list(range(n))",
      lambda v, k: [i for i in range(max(v, 0))]),
    P("multiples", "n", "xs", ("list its first @ multiples", "list @ multiples of it"),
      "[n * i for i in range(1, @ + 1)]", lambda v, k: list(accumulate([v] * k)), BIG),
    P("divisors", "n", "xs", ("list its divisors", "find all its divisors"),
      "[i for i in range(1, n + 1) if n % i == 0]",
      lambda v, k: [i for i in range(1, v + 1) if v // i * i == v]),
    P("to_string", "n", "s", ("write it as a string", "convert it to a string"), "str(n)",
      lambda v, k: f"{v}"),
    P("to_binary", "n", "s", ("write it in binary", "convert it to binary"), "format(n, 'b')",
      lambda v, k: bin(v).replace("0b", "")),
)
NUMBERS = (
    P("keep_even", "xs", "xs", ("keep the even numbers", "drop the odd numbers"),
      "[x for x in xs if x % 2 == 0]",
      _keep(lambda x, k: not x & 1)),
    P("keep_odd", "xs", "xs", ("keep the odd numbers", "drop the even numbers"),
      "[x for x in xs if x % 2 == 1]",
      _keep(lambda x, k: x & 1)),
    P("keep_greater", "xs", "xs", ("keep the numbers greater than @", "keep the numbers above @"),
      "[x for x in xs if x > @]", _keep(lambda x, k: not x <= k), (0, *NUM)),
    P("keep_less", "xs", "xs", ("keep the numbers less than @", "keep the numbers below @"),
      "[x for x in xs if x < @]", _keep(lambda x, k: not x >= k), (0, *NUM)),
    P("keep_multiples", "xs", "xs", ("keep the multiples of @", "keep the numbers divisible by @"),
      "[x for x in xs if x % @ == 0]", _keep(lambda x, k: x // k * k == x), BIG[1:]),
    P("remove_value", "xs", "xs", ("remove every @", "drop the numbers equal to @"),
      "[x for x in xs if x != @]",
      _keep(lambda x, k: not x == k), NUM),
    P("add_each", "xs", "xs", ("add @ to each", "increase each by @"), "[x + @ for x in xs]",
      _each(lambda x, k: sum((x, k))), NUM),
    P("subtract_each", "xs", "xs", ("subtract @ from each", "decrease each by @"), "[x - @ for x in xs]",
      _each(lambda x, k: x + (-k)), NUM),
    P("multiply_each", "xs", "xs", ("multiply each by @", "scale each by @"), "[x * @ for x in xs]",
      _each(lambda x, k: math.prod((x, k))), BIG),
    P("modulo_each", "xs", "xs", ("take each modulo @", "reduce each modulo @"), "[x % @ for x in xs]",
      _each(lambda x, k: divmod(x, k)[1]), BIG),
    P("square_each", "xs", "xs", ("square each", "multiply each by itself"), "[x * x for x in xs]",
      _each(lambda x, k: pow(x, 2))),
    P("negate_each", "xs", "xs", ("negate each", "flip the sign of each"), "[-x for x in xs]",
      _each(lambda x, k: 0 - x)),
    P("absolute_each", "xs", "xs", ("take the absolute value of each", "drop the sign of each"),
      "[abs(x) for x in xs]", _each(lambda x, k: max(x, -x))),
    P("sort", "xs", "xs", ("sort the numbers", "sort in ascending order"), "sorted(xs)",
      lambda v, k: sorted(v, reverse=True)[::-1]),
    P("sort_down", "xs", "xs", ("sort in descending order", "sort from largest to smallest"),
      "sorted(xs, reverse=True)", lambda v, k: sorted(v)[::-1]),
    P("reverse", "xs", "xs", ("reverse the list", "reverse the order"), "xs[::-1]",
      lambda v, k: list(reversed(v))),
    P("unique", "xs", "xs", ("remove duplicates", "drop repeated numbers"), "list(dict.fromkeys(xs))",
      _unique),
    P("first_few", "xs", "xs", ("keep the first @", "keep only the first @"), "xs[:@]",
      lambda v, k: list(islice(v, k)), FEW),
    P("last_few", "xs", "xs", ("keep the last @", "keep only the last @"), "xs[-@:]",
      lambda v, k: v[max(len(v) - k, 0):], FEW),
    P("drop_first", "xs", "xs", ("drop the first @", "skip the first @"), "xs[@:]",
      lambda v, k: list(islice(v, k, None)), FEW),
    P("every_other", "xs", "xs", ("keep every second number", "keep every other number"), "xs[::2]",
      lambda v, k: [x for i, x in enumerate(v) if i in range(0, 99, 2)]),
    P("running_sums", "xs", "xs", ("take the running sums", "list the running sums"),
      "[sum(xs[:i + 1]) for i in range(len(xs))]", lambda v, k: list(accumulate(v))),
    P("differences", "xs", "xs", ("take the differences of neighbours", "list the differences of neighbours"),
      "[b - a for a, b in zip(xs, xs[1:])]", lambda v, k: [b - a for a, b in pairwise(v)]),
    P("append", "xs", "xs", ("append @", "add @ at the end"), "xs + [@]", lambda v, k: [*v, k], NUM),
    P("sum", "xs", "n", ("take the sum", "add up the numbers"), "sum(xs)",
      lambda v, k: ([*accumulate(v)] or [0])[-1]),
    P("maximum", "xs", "n", ("take the maximum", "take the largest number"), "max(xs, default=0)",
      lambda v, k: sorted(v)[-1] if v else 0),
    P("minimum", "xs", "n", ("take the minimum", "take the smallest number"), "min(xs, default=0)",
      lambda v, k: sorted(v)[0] if v else 0),
    P("length", "xs", "n", ("take the length", "count the numbers"), "len(xs)", _count(lambda x, k: True)),
    P("count_even", "xs", "n", ("count the even numbers", "take the number of even numbers"),
      "sum(x % 2 == 0 for x in xs)", _count(lambda x, k: not x & 1)),
    P("count_greater", "xs", "n", ("count the numbers greater than @", "count the numbers above @"),
      "sum(x > @ for x in xs)", _count(lambda x, k: not x <= k), (0, *NUM)),
    P("count_unique", "xs", "n", ("count the distinct numbers", "take the number of distinct numbers"),
      "len(set(xs))", lambda v, k: len(Counter(v))),
    P("first", "xs", "n", ("take the first number", "pick the first number"), "xs[0] if xs else 0",
      lambda v, k: next(iter(v), 0)),
    P("last", "xs", "n", ("take the last number", "pick the last number"), "xs[-1] if xs else 0",
      lambda v, k: next(reversed(v), 0)),
    P("join_numbers", "xs", "s", ("join the numbers with '@'", "write the numbers with '@' between"),
      "'@'.join(str(x) for x in xs)", lambda v, k: k.join(map(str, v)), MARK),
    P("numbers_to_words", "xs", "ws", ("write each as a string", "convert each to a string"),
      "[str(x) for x in xs]",
      _each(lambda x, k: f"{x}")),
    P("count_numbers", "xs", "d", ("map each number to its count", "count each number in a dict"),
      "{str(x): xs.count(x) for x in xs}", lambda v, k: dict(Counter(map(str, v)))),
)
STRING = (
    P("upper", "s", "s", ("make it upper case", "convert it to upper case"), "s.upper()",
      lambda v, k: "".join(map(str.upper, v))),
    P("lower", "s", "s", ("make it lower case", "convert it to lower case"), "s.lower()",
      lambda v, k: "".join(map(str.lower, v))),
    P("title", "s", "s", ("make it title case", "convert it to title case"), "s.title()",
      lambda v, k: "".join(
          c.lower() if i and v[i - 1].isalpha() else c.upper() for i, c in enumerate(v))),
    P("reverse_string", "s", "s", ("reverse the string", "read it backwards"), "s[::-1]",
      lambda v, k: "".join(reversed(v))),
    P("first_chars", "s", "s", ("keep the first @ characters", "keep its first @ characters"), "s[:@]",
      lambda v, k: "".join(islice(v, k)), FEW),
    P("last_chars", "s", "s", ("keep the last @ characters", "keep its last @ characters"), "s[-@:]",
      lambda v, k: v[max(len(v) - k, 0):], FEW),
    P("drop_chars", "s", "s", ("drop the first @ characters", "skip its first @ characters"), "s[@:]",
      lambda v, k: "".join(islice(v, k, None)), FEW),
    P("every_other_char", "s", "s", ("keep every second character", "keep every other character"), "s[::2]",
      lambda v, k: "".join(c for i, c in enumerate(v) if not i & 1)),
    P("remove_letter", "s", "s", ("remove the letter '@'", "delete every '@'"), "s.replace('@', '')",
      lambda v, k: "".join(v.split(k)), LETTER),
    P("mask_letter", "s", "s", ("replace each '@' with '*'", "turn each '@' into '*'"), "s.replace('@', '*')",
      lambda v, k: "*".join(v.split(k)), LETTER),
    P("fill_spaces", "s", "s", ("replace spaces with '@'", "turn each space into '@'"), "s.replace(' ', '@')",
      lambda v, k: k.join(v.split(" ")), MARK),
    P("remove_vowels", "s", "s", ("remove the vowels", "delete the vowels"),
      "''.join(c for c in s if c not in 'aeiou')",
      lambda v, k: "".join(filter(lambda c: not VOWELS & {c}, v))),
    P("keep_vowels", "s", "s", ("keep only the vowels", "keep the vowels"),
      "''.join(c for c in s if c in 'aeiou')",
      lambda v, k: "".join(filter(VOWELS.__contains__, v))),
    P("sort_chars", "s", "s", ("sort the characters", "sort its characters"), "''.join(sorted(s))",
      lambda v, k: "".join(sorted(v, reverse=True)[::-1])),
    P("repeat", "s", "s", ("repeat it @ times", "repeat the string @ times"), "s * @",
      lambda v, k: "".join(v for _ in range(k)), (2, 3, 4)),
    P("append_char", "s", "s", ("append '@'", "add '@' at the end"), "s + '@'", lambda v, k: f"{v}{k}",
      LETTER),
    P("string_length", "s", "n", ("take the length of the string", "count its characters"), "len(s)",
      _count(lambda c, k: True)),
    P("count_letter", "s", "n", ("count the letter '@'", "count how often '@' occurs"), "s.count('@')",
      _count(lambda c, k: c == k), LETTER),
    P("count_vowels", "s", "n", ("count the vowels", "take the number of vowels"),
      "sum(c in 'aeiou' for c in s)",
      _count(lambda c, k: c in VOWELS)),
    P("count_words", "s", "n", ("count its words", "take the number of words"), "len(s.split())",
      lambda v, k: sum(1 for w in v.split(" ") if w)),
    P("count_unique_chars", "s", "n",
      ("count the distinct characters", "take the number of distinct characters"),
      "len(set(s))", lambda v, k: len(Counter(v))),
    P("find_letter", "s", "n", ("find the first '@'", "take the position of the first '@'"), "s.find('@')",
      lambda v, k: v.index(k) if k in v else -1, LETTER),
    P("split", "s", "ws", ("split it into words", "split it at spaces"), "s.split()",
      lambda v, k: [w for w in v.split(" ") if w]),
    P("characters", "s", "ws", ("list its characters", "split it into characters"), "list(s)",
      lambda v, k: [c for c in v]),
    P("split_at", "s", "ws", ("split it at '@'", "split it at each '@'"), "s.split('@')",
      lambda v, k: v.replace(k, "\n").split("\n"), LETTER),
    P("positions", "s", "xs", ("list the positions of '@'", "find the positions of '@'"),
      "[i for i, c in enumerate(s) if c == '@']", lambda v, k: [i for i in range(len(v)) if v[i] == k],
      LETTER),
    P("codes", "s", "xs", ("list the character codes", "take the character codes"), "[ord(c) for c in s]",
      lambda v, k: list(v.encode("latin-1"))),
    P("count_chars", "s", "d", ("map each character to its count", "count each character in a dict"),
      "{c: s.count(c) for c in s}", lambda v, k: dict(Counter(v))),
)
WORDS = (
    P("sort_words", "ws", "ws", ("sort the words", "sort the words in alphabetical order"), "sorted(ws)",
      lambda v, k: sorted(v, reverse=True)[::-1]),
    P("sort_by_length", "ws", "ws", ("sort the words by length", "order the words by length"),
      "sorted(ws, key=len)",
      lambda v, k: [w for size in range(100) for w in v if len(w) == size]),
    P("reverse_words", "ws", "ws", ("reverse the list of words", "reverse the order of the words"),
      "ws[::-1]",
      lambda v, k: list(reversed(v))),
    P("unique_words", "ws", "ws", ("remove duplicate words", "drop repeated words"),
      "list(dict.fromkeys(ws))", _unique),
    P("first_words", "ws", "ws", ("keep the first @ words", "keep only the first @ words"), "ws[:@]",
      lambda v, k: list(islice(v, k)), FEW),
    P("drop_words", "ws", "ws", ("drop the first @ words", "skip the first @ words"), "ws[@:]",
      lambda v, k: list(islice(v, k, None)), FEW),
    P("upper_words", "ws", "ws", ("make each word upper case", "convert each word to upper case"),
      "[w.upper() for w in ws]", _each(lambda w, k: "".join(map(str.upper, w)))),
    P("flip_words", "ws", "ws", ("reverse each word", "read each word backwards"), "[w[::-1] for w in ws]",
      _each(lambda w, k: "".join(reversed(w)))),
    P("cut_words", "ws", "ws", ("cut each word to @ characters", "keep the first @ characters of each word"),
      "[w[:@] for w in ws]", _each(lambda w, k: "".join(islice(w, k))), FEW),
    P("add_suffix", "ws", "ws", ("append '@' to each word", "add '@' at the end of each word"),
      "[w + '@' for w in ws]", _each(lambda w, k: f"{w}{k}"), LETTER),
    P("keep_longer", "ws", "ws", ("keep the words longer than @", "keep the words of more than @ characters"),
      "[w for w in ws if len(w) > @]", _keep(lambda w, k: w[k:]), FEW),
    P("keep_shorter", "ws", "ws",
      ("keep the words shorter than @", "keep the words of fewer than @ characters"),
      "[w for w in ws if len(w) < @]", _keep(lambda w, k: not w[k - 1:]), (2, 3, 4, 5)),
    P("keep_containing", "ws", "ws", ("keep the words containing '@'", "keep the words with '@'"),
      "[w for w in ws if '@' in w]", _keep(lambda w, k: w.count(k)), LETTER),
    P("keep_starting", "ws", "ws", ("keep the words starting with '@'", "keep the words that start with '@'"),
      "[w for w in ws if w.startswith('@')]", _keep(lambda w, k: w[:1] == k), LETTER),
    P("count_words_in_list", "ws", "n", ("count the words", "take the number of words in the list"),
      "len(ws)",
      _count(lambda w, k: True)),
    P("total_length", "ws", "n", ("take the total length", "add up the word lengths"),
      "sum(len(w) for w in ws)",
      lambda v, k: len("".join(v))),
    P("longest_length", "ws", "n", ("take the length of the longest word", "find the largest word length"),
      "max((len(w) for w in ws), default=0)", lambda v, k: sorted([0, *map(len, v)])[-1]),
    P("count_longer", "ws", "n",
      ("count the words longer than @", "count the words of more than @ characters"),
      "sum(len(w) > @ for w in ws)", _count(lambda w, k: w[k:]), FEW),
    P("count_containing", "ws", "n", ("count the words containing '@'", "count the words with '@'"),
      "sum('@' in w for w in ws)", _count(lambda w, k: w.count(k)), LETTER),
    P("join_words", "ws", "s", ("join the words with '@'", "write the words with '@' between"),
      "'@'.join(ws)",
      lambda v, k: "".join(k * (i > 0) + w for i, w in enumerate(v)), MARK),
    P("join_spaces", "ws", "s", ("join the words with spaces", "write the words with spaces between"),
      "' '.join(ws)",
      lambda v, k: "".join(" " * (i > 0) + w for i, w in enumerate(v))),
    P("longest_word", "ws", "s", ("take the longest word", "pick the longest word"),
      "max(ws, key=len, default='')",
      lambda v, k: next((w for size in range(99, -1, -1) for w in v if len(w) == size), "")),
    P("first_word", "ws", "s", ("take the first word", "pick the first word"), "ws[0] if ws else ''",
      lambda v, k: next(iter(v), "")),
    P("last_word", "ws", "s", ("take the last word", "pick the last word"), "ws[-1] if ws else ''",
      lambda v, k: next(reversed(v), "")),
    P("initials", "ws", "s", ("take the first letters", "join the first letters"),
      "''.join(w[:1] for w in ws)",
      lambda v, k: "".join(w[0] for w in v if w)),
    P("word_lengths", "ws", "xs", ("list the word lengths", "take the length of each word"),
      "[len(w) for w in ws]",
      _each(lambda w, k: sum(1 for _ in w))),
    P("count_each_word", "ws", "d", ("map each word to its count", "count each word in a dict"),
      "{w: ws.count(w) for w in ws}", lambda v, k: dict(Counter(v))),
    P("map_lengths", "ws", "d", ("map each word to its length", "put each word length in a dict"),
      "{w: len(w) for w in ws}", lambda v, k: dict(zip(v, map(len, v), strict=True))),
)
DICT = (
    P("add_values", "d", "d", ("add @ to each value", "increase each value by @"),
      "{k: v + @ for k, v in d.items()}", lambda v, k: dict(zip(v, [x + k for x in v.values()], strict=True)),
      NUM),
    P("multiply_values", "d", "d", ("multiply each value by @", "scale each value by @"),
      "{k: v * @ for k, v in d.items()}", lambda v, k: dict(zip(v, [x * k for x in v.values()], strict=True)),
      BIG),
    P("keep_values", "d", "d", ("keep the values greater than @", "keep the values above @"),
      "{k: v for k, v in d.items() if v > @}",
      lambda v, k: dict(filter(lambda item: not item[1] <= k, v.items())),
      NUM),
    P("keep_keys", "d", "d", ("keep the keys longer than @", "keep the keys of more than @ characters"),
      "{k: v for k, v in d.items() if len(k) > @}",
      lambda v, k: dict(filter(lambda item: item[0][k:], v.items())),
      FEW),
    P("count_keys", "d", "n", ("count the keys", "take the number of keys"), "len(d)",
      _count(lambda key, k: True)),
    P("sum_values", "d", "n", ("take the sum of the values", "add up the values"), "sum(d.values())",
      lambda v, k: sum(v[key] for key in v)),
    P("largest_value", "d", "n", ("take the largest value", "find the largest value"),
      "max(d.values(), default=0)",
      lambda v, k: sorted(v.values())[-1] if v else 0),
    P("smallest_value", "d", "n", ("take the smallest value", "find the smallest value"),
      "min(d.values(), default=0)", lambda v, k: sorted(v.values())[0] if v else 0),
    P("look_up", "d", "n", ("look up '@'", "take the value of '@'"), "d.get('@', 0)",
      lambda v, k: v[k] if k in v else 0, LETTER),
    P("sorted_keys", "d", "ws", ("list the keys in order", "sort the keys"), "sorted(d)",
      lambda v, k: sorted(v.keys(), reverse=True)[::-1]),
    P("keys_above", "d", "ws", ("list the keys with values above @", "find the keys with values above @"),
      "sorted(k for k in d if d[k] > @)", lambda v, k: sorted(key for key, x in v.items() if not x <= k),
      NUM),
    P("sorted_values", "d", "xs", ("list the values in order", "sort the values"), "sorted(d.values())",
      lambda v, k: sorted(v.values(), reverse=True)[::-1]),
    P("best_key", "d", "s", ("take the key with the largest value", "find the key with the largest value"),
      "max(sorted(d), key=d.get, default='')",
      lambda v, k: min(v, key=lambda key: (-v[key], key)) if v else ""),
    P("join_keys", "d", "s", ("join the keys with '@'", "write the keys with '@' between"),
      "'@'.join(sorted(d))",
      lambda v, k: k.join(sorted(v.keys())), MARK),
)
# fmt: on

PRIMITIVES: dict[str, Primitive] = {p.name: p for p in (*INT, *NUMBERS, *STRING, *WORDS, *DICT)}
