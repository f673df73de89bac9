"""Word problems of two to four steps, with a worked solution: one equation a line, then ``#### N``.

A problem walks through a chain of step types (``math_tables.STEPS``); the running value is in 1 to 99
and products and quotients come from the small tables, so that a small model can know the arithmetic by heart.
The sequence of step types is the composition that is held out for evaluation.
"""

import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tasks.reference import math_tables as tables
from tasks.reference.math_tables import COST, PLAIN, STARTS, STEPS, Step
from tasks.reference.problem import Problem, Split, split_of

DEPTHS = (2, 3, 4)
MAX_VALUE = 99
OPS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@dataclass
class Chain:
    """A problem under construction."""

    mode: str
    subject: tuple[str, ...]
    items: str
    box: str
    value: int = 0
    named: bool = False  # the next sentence has to name the subject: a pronoun could mean someone else
    people: set[str] = field(default_factory=set)
    sentences: list[str] = field(default_factory=list)
    equations: list[tuple[int, str, int]] = field(default_factory=list)
    types: list[str] = field(default_factory=list)


def calculate(left: int, op: str, right: int) -> int | None:
    """The result where it is exact and between 1 and ``MAX_VALUE``, else None."""
    if op == "/" and (right == 0 or left % right):
        return None
    result = OPS[op](left, right)
    return result if 1 <= result <= MAX_VALUE else None


def _easy(left: int, op: str, right: int) -> bool:
    """Whether the equation is in the part of the tables that is to be learned by heart."""
    if calculate(left, op, right) is None:
        return False
    if op == "*":
        return right == 2 or left <= 10
    return op != "/" or right == 2 or left // right <= 10


def _numbers(step: Step, value: int) -> list[int]:
    """The numbers the step may use on ``value``; a value that goes on is at least 2, for the plurals."""
    pairs = [((n, value) if step.flipped else (value, n), n) for n in step.numbers]
    return [
        n for (left, right), n in pairs if _easy(left, step.op, right) and (step.last or OPS[step.op](left, right) >= 2)
    ]


def _allowed(mode: str, plural: bool, last: bool) -> list[str]:
    """Step types whose sentences make sense after a value of this mode held by one person or by two."""
    return [
        name
        for name, step in STEPS.items()
        if mode in step.modes
        and (last or not step.last)
        and not (plural and (step.subject == "both" or (name == "split" and mode == COST)))
    ]


def compositions() -> set[tuple[str, ...]]:
    """Every sequence of step types of each depth that the grammar can write (numbers left aside)."""
    found: set[tuple[str, ...]] = set()

    def extend(types: tuple[str, ...], mode: str, plural: bool, depth: int) -> None:
        if len(types) == depth:
            found.add(types)
            return
        for name in _allowed(mode, plural, len(types) == depth - 1):
            step = STEPS[name]
            after = step.subject == "both" or (plural and step.subject == "same")
            extend((*types, name), step.to_mode or mode, after, depth)

    for depth in DEPTHS:
        for mode in PLAIN:
            extend((), mode, False, depth)
        for name, start in STARTS.items():
            extend((name,), start.mode, False, depth)
    return found


def _say(chain: Chain, template: str, rng: random.Random, **values: object) -> str:
    """Fill a template for the present subject."""
    plural = len(chain.subject) > 1
    name = " and ".join(chain.subject)
    pronoun = "They" if plural else "He" if chain.subject[0] in tables.HE else "She"
    subject = name if chain.named or rng.random() < 0.25 else pronoun
    text = re.sub(r"\[(\w+)\|(\w+)\]", r"\2" if plural else r"\1", template)
    return text.format(
        S=subject,
        T=name,
        items=chain.items,
        box=chain.box,
        boxes=tables.BOX_PLURALS[chain.box],
        good=rng.choice(tables.GOODS),
        **values,
    )


def _someone_new(chain: Chain, rng: random.Random) -> str:
    name = rng.choice([name for name in tables.HE + tables.SHE if name not in chain.people])
    chain.people.add(name)
    return name


def _begin(rng: random.Random) -> Chain:
    """A chain with its first sentence; half of the time with a first equation too."""
    name = rng.choice(tables.HE + tables.SHE)
    chain = Chain("", (name,), rng.choice(tables.NOUNS), rng.choice(tables.BOXES), people={name})
    if rng.random() < 0.5:
        chain.mode = rng.choices(list(PLAIN), weights=(3, 1, 1))[0]
        chain.value = rng.randint(4, 30)
        chain.sentences.append(_say(chain, rng.choice(PLAIN[chain.mode]), rng, n=chain.value))
        return chain
    kind = rng.choice(list(STARTS))
    start = STARTS[kind]
    a, b = rng.choice([(a, b) for a in start.left for b in start.right if _easy(a, start.op, b)])
    chain.mode, chain.value = start.mode, OPS[start.op](a, b)
    chain.sentences.append(_say(chain, rng.choice(tables.START_TEXTS[kind]), rng, a=a, b=b))
    chain.equations.append((a, start.op, b))
    chain.types.append(kind)
    return chain


def _advance(chain: Chain, last: bool, rng: random.Random) -> bool:
    """Add one step (and the question after the last one); False where no step fits the value."""
    options = {
        name: numbers
        for name in _allowed(chain.mode, len(chain.subject) > 1, last)
        if (numbers := _numbers(STEPS[name], chain.value))
    }
    if not options:
        return False
    name = rng.choice(list(options))
    step, n = STEPS[name], rng.choice(options[name])
    template = rng.choice(tables.STEP_TEXTS[name, chain.mode])
    other = _someone_new(chain, rng)
    new = rng.choice([noun for noun in tables.NOUNS if noun != chain.items])
    chain.sentences.append(_say(chain, template, rng, n=n, o=other, new=new, times=tables.TIMES.get(n)))
    left, right = (n, chain.value) if step.flipped else (chain.value, n)
    chain.equations.append((left, step.op, right))
    chain.types.append(name)
    chain.value = OPS[step.op](left, right)
    if step.subject != "same":
        chain.subject = (other,) if step.subject == "other" else (*chain.subject, other)
    chain.named = "{o}" in template
    if "{new}" in template:
        chain.items = new
    chain.mode = step.to_mode or chain.mode
    if last:
        question = tables.QUESTIONS[name if step.last else "", chain.mode]
        chain.sentences.append(_say(chain, rng.choice(question), rng, o=other))
    return True


def _solution(equations: list[tuple[int, str, int]]) -> str:
    """The answer text for equations whose results are right."""
    results = [OPS[op](left, right) for left, op, right in equations]
    pairs = zip(equations, results, strict=True)
    lines = [f"{left} {op} {right} = {result}" for (left, op, right), result in pairs]
    return " " + "\n".join([*lines, f"#### {results[-1]}"]) + "\n"


def draw(rng: random.Random) -> Problem | None:
    """One random problem of any split; None where the draw came to a dead end."""
    depth = rng.choices(DEPTHS, weights=(3, 4, 3))[0]
    chain = _begin(rng)
    while len(chain.types) < depth:
        if not _advance(chain, len(chain.types) == depth - 1, rng):
            return None
    return Problem(
        domain="math",
        prompt="Question: " + " ".join(chain.sentences) + "\nAnswer:",
        answer=_solution(chain.equations),
        meta={"answer": chain.value, "steps": depth, "step_types": chain.types},
    )


def composition_key(problem: Problem) -> str:
    """What is held out: the sequence of step types."""
    return "math:" + ">".join(problem.meta["step_types"])


def problems(split: Split, seed: int = 0) -> Iterator[Problem]:
    """An endless, deterministic stream of the split's problems; only train may repeat one."""
    rng = random.Random(f"{split}-{seed}-math")
    seen: set[str] = set()
    while True:
        problem = draw(rng)
        if problem is None or split_of(problem.prompt, composition_key(problem)) != split:
            continue
        if split != "train":
            if problem.id in seen:
                continue
            seen.add(problem.id)
        yield problem


def parse_equations(answer: str) -> list[tuple[int, str, int, int]]:
    """The (left, operator, right, result) of each equation in a worked solution."""
    return [(int(left), op, int(right), int(result)) for left, op, right, result in EQUATION.findall(answer)]


def _rework(equations: list[tuple[int, str, int, int]], at: int, change: tuple[str, int]) -> str | None:
    """The solution with another operator and number in step ``at``, carried through; None if it breaks."""
    wrong: list[tuple[int, str, int]] = []
    value = equations[0][0]
    previous = value  # the first step keeps its left number: only its operator and right number change
    for i, (left, op, right, result) in enumerate(equations):
        flipped = i > 0 and left != previous
        number = left if flipped else right
        if i == at:
            op, number = change
        pair = (number, op, value) if flipped else (value, op, number)
        carried = calculate(*pair)
        if carried is None:
            return None
        wrong.append(pair)
        value, previous = carried, result
    return _solution(wrong)


def distractors(problem: Problem, rng: random.Random, count: int = 3) -> list[str]:
    """Wrong solutions: one step has a wrong number or operator, carried through; all final numbers differ."""
    equations = parse_equations(problem.answer)
    changes = []
    for i, (left, op, right, _) in enumerate(equations):
        number = left if i and left != equations[i - 1][3] else right
        # Small shifts keep the numbers plausible: a wrong solution must not stand out without doing the sums.
        changes += [(i, (op, number + d)) for d in (-3, -2, -1, 1, 2, 3) if number + d >= 2]
        changes += [(i, (other, number)) for other in OPS if other != op]
    rng.shuffle(changes)
    finals, chosen = {problem.meta["answer"]}, []
    # Steps that divide can refuse most changes; larger shifts of the last number then fill the list.
    last = len(equations) - 1
    spare = [(last, (op, n)) for op in "+-" for n in rng.sample(range(2, 90), 88)]
    for at, change in [*changes, *spare]:
        text = _rework(equations, at, change)
        if text is None or (final := parse_equations(text)[-1][3]) in finals:
            continue
        finals.add(final)
        chosen.append(text)
        if len(chosen) == count:
            break
    return chosen
