"""Multiple choice made from the problems of the generators.

A model is scored by the log-likelihood it gives each continuation after the same context; the letters A to D
appear nowhere.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tasks.reference import code, knowledge, math, writing
from tasks.reference.problem import Problem, Split

GENERATORS = {"knowledge": knowledge, "code": code, "math": math, "writing": writing}
WRONG = 3


@dataclass(frozen=True)
class Choice:
    """A context and four continuations of it, of which ``choices[answer]`` is the right one."""

    domain: str
    question: str
    choices: list[str]
    answer: int

    @property
    def id(self) -> str:
        """Stable name: 12 hex digits over the context and the continuations, behind the domain."""
        digest = hashlib.sha256("\x00".join([self.question, *self.choices]).encode()).hexdigest()
        return f"{self.domain}-choice-{digest[:12]}"


def choice_from(problem: Problem, rng: random.Random) -> Choice:
    """``problem`` with three wrong answers beside the right one, which stands at a random position."""
    right = problem.answer
    continuations = GENERATORS[problem.domain].distractors(problem, rng, WRONG)
    if problem.domain == "knowledge":
        # The bare value: a closing newline would only add the same token to all four.
        right, continuations = right.rstrip("\n"), [text.rstrip("\n") for text in continuations]
    if len(continuations) != WRONG or len({right, *continuations}) != WRONG + 1:
        raise ValueError(f"{problem.id}: {WRONG} different wrong answers needed, got {continuations!r}")
    answer = rng.randrange(WRONG + 1)
    return Choice(problem.domain, problem.prompt, continuations[:answer] + [right] + continuations[answer:], answer)


def questions(domain: str, split: Split = "evaluation", seed: int = 0) -> Iterator[Choice]:
    """Multiple choice over the problems of one domain, in the order of that domain's own stream."""
    if domain not in GENERATORS:
        raise ValueError(f"unknown domain {domain!r}; known: {', '.join(GENERATORS)}")
    rng = random.Random(f"{split}-{seed}-choices-{domain}")
    for problem in GENERATORS[domain].problems(split, seed):
        if problem.meta.get("kind") != "passage":
            yield choice_from(problem, rng)
