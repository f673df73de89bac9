"""Published tests that run where no program is: the text of this file is a program of its own in the sandbox.

``record`` finds what the tests ask of a function, ``judge`` runs them with the answers that a program gave. It uses the
standard library alone. Tests that draw at random draw the same in both.
"""

import ast
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

ANSWER = "_winnow_answer"  # stands in a test for the answer with that number


class Unknown:
    """What a function answers while its calls are recorded: every comparison holds, and arithmetic gives it back."""

    def _true(self, *others: Any) -> bool:
        return True

    def _itself(self, *others: Any) -> "Unknown":
        return self

    __bool__ = __contains__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _true
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __mod__ = _itself
    __pow__ = __neg__ = __abs__ = __round__ = __getitem__ = __call__ = _itself
    __hash__ = None  # type: ignore[assignment]

    def __float__(self) -> float:
        return 0.0

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Truth:
    """An answer of a type that is not compared: it is true or false, and equals nothing."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value


class _Tried(ast.NodeTransformer):
    """Tests in which an assertion is only evaluated, and does not stop those after it."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.fix_missing_locations(ast.copy_location(ast.Try([ast.Expr(node.test)], [handler], [], []), node))


def record(setup: str, test: str, name: str) -> list[list[Any]]:
    """Arguments and named arguments of every call of ``name`` in ``test``, behind the statements ``setup``."""
    calls: list[list[Any]] = []

    def recorded(*arguments: Any, **named: Any) -> Unknown:
        calls.append(copy.deepcopy([list(arguments), named]))
        return Unknown()

    _run(setup, compile(_Tried().visit(ast.parse(test)), "test", "exec"), {name: recorded})
    return calls


def judge(setup: str, tests: list[str], name: str, answers: list[Any], asked: list[Any]) -> list[Any]:
    """How many of ``tests`` pass, and whether the calls that they made are those of ``asked`` as far as they got.

    ``answers``: what ``beside_program.answer`` gave for each call; of another form where the call failed.
    """
    passed, as_asked = 0, True
    for test in tests:
        made = 0

        def asked_now(*arguments: Any, **named: Any) -> Any:
            nonlocal made, as_asked
            made += 1
            if made > len(asked) or asked[made - 1] != [list(arguments), named]:
                as_asked = False
                raise LookupError("another call than was recorded")
            return _answer(answers[made - 1])

        numbered: Callable[[int], Any] = lambda number: _answer(answers[number])  # noqa: E731
        try:
            _run(setup, test, {name: asked_now, ANSWER: numbered})
            passed += 1
        except BaseException:
            pass
    return [passed, as_asked]


def _answer(given: Any) -> Any:
    kind, value = given if isinstance(given, list) and len(given) == 2 else ("failed", None)
    if kind == "value":
        return copy.deepcopy(value)
    if kind == "truth" and isinstance(value, bool):
        return Truth(value)
    raise RuntimeError("the call failed")


def _run(setup: str, test: Any, names: dict[str, Any]) -> None:
    space: dict[str, Any] = {"__name__": "tests"}
    exec(setup, space)
    space.update(names)
    random.seed(0)
    exec(test, space)
