"""Code problems: a docstring that chains one to three operations, and the Python body it asks for."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.reference.primitives import LETTER, PRIMITIVES, Constant, Primitive
from tasks.reference.problem import Problem, Split, split_of

Step = tuple[Primitive, Constant]

BY_INPUT = {t: tuple(p for p in PRIMITIVES.values() if p.takes == t) for t in ("n", "s", "xs", "ws", "d")}
ARGUMENT_WEIGHTS = {"n": 15, "s": 22, "xs": 33, "ws": 20, "d": 10}
DEPTH_WEIGHTS = {1: 20, 2: 40, 3: 40}
TESTS = 10
ALPHABET = "abcdeorst"


def _word(rng: random.Random) -> str:
    word = "".join(rng.choices(ALPHABET, k=rng.choice((1, 1, 2, 3, 4, 5, 6))))
    return word.capitalize() if rng.random() < 0.15 else word


def _input(kind: str, rng: random.Random, edge: bool) -> Any:
    """A random argument of a type; ``edge`` asks for its empty (or zero) value."""
    if kind == "n":
        return 0 if edge else rng.choice((rng.randint(-20, 30), rng.randint(0, 99), rng.randint(100, 999)))
    size = 0 if edge else rng.randint(1, 7)
    if kind == "xs":
        values = [rng.randint(-6, 20) for _ in range(size)]
        # Random numbers repeat too seldom to show what removing duplicates or counting does.
        return values + values[:1] if rng.random() < 0.3 else values
    if kind == "s":
        return " ".join(_word(rng) for _ in range(min(size, 4)))
    words = [_word(rng) for _ in range(size)]
    if kind == "ws":
        return words + words[:1] if rng.random() < 0.3 else words
    # Single letters, so that looking up a letter finds one now and then.
    words = [rng.choice(LETTER) if rng.random() < 0.4 else word for word in words]
    return {word: rng.randint(-3, 20) for word in words}


def _is_small(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 10**6
    if isinstance(value, str):
        return len(value) <= 80
    items = value.values() if isinstance(value, dict) else value
    return len(value) <= 40 and all(map(_is_small, items))


def run_steps(steps: Sequence[Step], value: Any) -> Any:
    """The reference result of a chain on ``value``, or None when a value on the way grows too large."""
    for primitive, constant in steps:
        value = primitive.ref(value, constant)
        if not _is_small(value):
            return None
    return value


def _make_tests(steps: Sequence[Step], prompt: str) -> list[list[Any]] | None:
    """Ten [argument, expected] pairs, or None when the chain cannot be told from a simpler one by them."""
    rng = random.Random(f"code-tests-{prompt}")
    tests: list[list[Any]] = []
    for attempt in range(4 * TESTS):
        value = _input(steps[0][0].takes, rng, edge=attempt == 0)
        expected = run_steps(steps, value)
        if expected is not None and all(value != seen for seen, _ in tests):
            tests.append([value, expected])
        if len(tests) == TESTS:
            return tests if _discriminates(steps, tests) else None
    return None


def _discriminates(steps: Sequence[Step], tests: list[list[Any]]) -> bool:
    """Whether outputs vary, differ from the inputs, and change when any step that may be left out is."""
    varied = len({repr(expected) for _, expected in tests}) >= 3
    if not varied or all(value == expected for value, expected in tests):
        return False
    for i, (primitive, _) in enumerate(steps):
        rest = [*steps[:i], *steps[i + 1 :]]
        if primitive.takes == primitive.gives and all(run_steps(rest, value) == out for value, out in tests):
            return False
    return True


def _draw_steps(depth: int, rng: random.Random) -> list[Step]:
    kind = rng.choices(list(ARGUMENT_WEIGHTS), list(ARGUMENT_WEIGHTS.values()))[0]
    steps: list[Step] = []
    for _ in range(depth):
        primitive = rng.choice(BY_INPUT[kind])
        steps.append((primitive, rng.choice(primitive.constants)))
        kind = primitive.gives
    return steps


def write_prompt(steps: Sequence[Step], phrases: Sequence[str]) -> str:
    """The function's head and docstring, with one of its primitive's phrases for each step."""
    *before, last = (phrase.replace("@", str(k)) for phrase, (_, k) in zip(phrases, steps, strict=True))
    if last.startswith("take "):
        last = "return " + last.removeprefix("take ")
    text = ", then ".join([*before, last])
    return f'def f({steps[0][0].takes}):\n    """{text[0].upper()}{text[1:]}."""'


def write_answer(steps: Sequence[Step]) -> str:
    """The canonical function body: one assignment a step, the last a return."""
    lines = [f"    {p.gives} = {p.expression(constant)}\n" for p, constant in steps[:-1]]
    last, constant = steps[-1]
    return "\n" + "".join(lines) + f"    return {last.expression(constant)}\n"


def _composition_key(steps: Sequence[Step]) -> str | None:
    """The primitives in order; None for a single one, which has only constants and phrasing to hold out."""
    return "code:" + ">".join(primitive.name for primitive, _ in steps) if len(steps) > 1 else None


def _draw_problem(split: Split, depth: int, rng: random.Random, seen: set[str]) -> Problem | None:
    """One try at a new problem of the split and depth; the cheap refusals come before the tests are made."""
    steps = _draw_steps(depth, rng)
    prompt = write_prompt(steps, [rng.choice(primitive.phrases) for primitive, _ in steps])
    if prompt in seen or split_of(prompt, _composition_key(steps)) != split:
        return None
    tests = _make_tests(steps, prompt)
    if tests is None:
        return None
    meta = {
        "depth": depth,
        "primitives": [primitive.name for primitive, _ in steps],
        "constants": [constant for _, constant in steps],
        "tests": tests,
    }
    return Problem("code", prompt, write_answer(steps), meta)


def problems(split: Split, seed: int = 0) -> Iterator[Problem]:
    """An endless, deterministic stream of code problems of one split; outside train no prompt comes twice."""
    rng = random.Random(f"code-{split}-{seed}")
    seen: set[str] = set()
    while True:
        depth = rng.choices(list(DEPTH_WEIGHTS), list(DEPTH_WEIGHTS.values()))[0]
        # The depth is kept through the refusals, so that these do not bend the mix; but not for ever, since
        # the few single-step prompts of a small split run out.
        for _ in range(200):
            problem = _draw_problem(split, depth, rng, seen)
            if problem is not None:
                if split != "train":
                    seen.add(problem.prompt)
                yield problem
                break


def _swap_step(steps: Sequence[Step], rng: random.Random, any_output: bool) -> list[Step]:
    """The chain with one constant or primitive redrawn; ``any_output`` lets the last step change its type."""
    i = len(steps) - 1 if any_output else rng.randrange(len(steps))
    old, _ = steps[i]
    options = [p for p in BY_INPUT[old.takes] if any_output or p.gives == old.gives]
    new = old if len(old.constants) > 1 and rng.random() < 0.4 else rng.choice(options)
    return [*steps[:i], (new, rng.choice(new.constants)), *steps[i + 1 :]]


def distractors(problem: Problem, rng: random.Random, count: int = 3) -> list[str]:
    """``count`` distinct wrong answers, each one step off the right one and failing at least one test."""
    meta = problem.meta
    steps = [(PRIMITIVES[name], k) for name, k in zip(meta["primitives"], meta["constants"], strict=True)]
    wrong: list[str] = []
    for attempt in range(400):
        # Some types have few operations between them: after 100 tries the last step may return another type.
        swapped = _swap_step(steps, rng, any_output=attempt >= 100)
        answer = write_answer(swapped)
        outputs = [run_steps(swapped, value) for value, _ in meta["tests"]]
        differs = any(out != expected for out, (_, expected) in zip(outputs, meta["tests"], strict=True))
        if differs and None not in outputs and answer not in wrong:
            wrong.append(answer)
        if len(wrong) == count:
            return wrong
    raise ValueError(f"found only {len(wrong)} of {count} wrong answers for {problem.id}")
