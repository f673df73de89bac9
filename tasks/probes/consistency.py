"""Does a model give the same answer when the same question is put in another way? Rates, beside the accuracy.

What the generators of the reference tasks give for it:

- **paraphrase_knowledge**: every wording of a question about one fact (three of one step, two of two steps), with the
  same four choices. At least one of them is held out of training, the others may have been trained on.
- **paraphrase_code**: a code problem in its own wording, and with every step in the other of its two phrases.
- **negation_code**: "keep the first 3" against "drop the first 3" (ten of the operations come in such pairs), the rest
  of the chain unchanged, with the two programs as choices. The answers must be complementary: what is right for the
  one is wrong for the other.
- **permutation_knowledge**: the four choices are listed in the question and turned round, so that each stands at each
  place once. The reference model was never shown a listing: the accuracy tells how far it follows one. Without a
  listing, order plays no part, since every choice is scored by itself.

There is no negation of facts and no paraphrase of word problems and stories: the reference model knows no words for
them.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, product
from typing import ClassVar

from harness.contracts.backend import Backend, Reader, TokenCounter
from harness.contracts.record import Sample
from harness.contracts.task import ModelTask, Need, TaskResult
from tasks.reference import code, knowledge
from tasks.reference.choices import Choice, choice_from
from tasks.reference.items import evaluation_problems, first_distinct
from tasks.reference.primitives import PRIMITIVES, Primitive
from tasks.reference.problem import Problem
from tasks.scores import mean_score, require_finite, share_score

_PAIRS = (
    ("keep_even", "keep_odd"), ("keep_vowels", "remove_vowels"), ("first_few", "drop_first"),
    ("first_chars", "drop_chars"), ("first_words", "drop_words"),
)  # fmt: skip
# What one of the two keeps, the other one drops.
COMPLEMENT = dict(_PAIRS) | {second: first for first, second in _PAIRS}


@dataclass(frozen=True)
class Wording:
    """One way to ask: the continuations that are scored after ``context``, and which answer each of them means."""

    context: str
    continuations: tuple[str, ...]
    means: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """One question in several wordings, and the answer that is right in all of them."""

    id: str
    domain: str
    wordings: tuple[Wording, ...]
    answer: int


def rotations(choices: Sequence[str]) -> list[tuple[int, ...]]:
    """Orders of the choices, as indices: as many as there are choices, each of them at each place once."""
    n = len(choices)
    return [tuple((start + place) % n for place in range(n)) for start in range(n)]


def asked(reader: Reader, questions: Sequence[Question]) -> list[tuple[str, str]]:
    """(context, continuation) of every wording, as the model reads them."""
    return [
        (reader.prompt(wording.context), text)
        for question in questions
        for wording in question.wordings
        for text in wording.continuations
    ]


def ask(backend: Backend, task: str, questions: Sequence[Question], seed: int = 0) -> TaskResult:
    """``consistent``, ``acc`` and ``all_right`` for each domain of the questions; a sample's score is the first.

    ``consistent`` is the share of questions that get the same answer in every wording, ``all_right`` of those that get
    the right one in every wording (Wilson's intervals), ``acc`` the mean over questions of the share of wordings that
    get the right one (bootstrap over questions). The answer is the continuation of the largest log-likelihood, the
    first of them where there are several. Raises BrokenModel where a log-likelihood is not finite.
    """
    results = backend.loglikelihood(asked(backend, questions), progress=f"{task}: scoring")
    require_finite(results, task)
    logprobs = iter([result.logprob for result in results])
    samples = []
    for question in questions:
        scored = [[next(logprobs) for _ in wording.continuations] for wording in question.wordings]
        picked = [
            wording.means[max(range(len(own)), key=own.__getitem__)]
            for wording, own in zip(question.wordings, scored, strict=True)
        ]
        right = sum(answer == question.answer for answer in picked) / len(picked)
        detail = {"picked": picked, "answer": question.answer, "acc": right, "logprobs": scored}
        samples.append(Sample(task, question.id, float(len(set(picked)) == 1), domain=question.domain, detail=detail))
    scores = []
    for domain in dict.fromkeys(question.domain for question in questions):
        own_samples = [sample for sample in samples if sample.domain == domain]
        shares = [float(sample.detail["acc"]) for sample in own_samples]
        scores.append(share_score(task, "consistent", [sample.score for sample in own_samples], domain))
        scores.append(mean_score(task, "acc", shares, seed, domain))
        scores.append(share_score(task, "all_right", [float(share == 1) for share in shares], domain))
    return TaskResult(scores, samples)


def _question(domain: str, problem: Problem, choice: Choice, contexts: Sequence[str]) -> Question:
    """The question with the same continuations after each of the contexts."""
    means = tuple(range(len(choice.choices)))
    wordings = tuple(Wording(context, tuple(choice.choices), means) for context in contexts)
    return Question(f"{domain}-{problem.id}", domain, wordings, choice.answer)


def _choice(problem: Problem, seed: int) -> Choice:
    return choice_from(problem, random.Random(f"consistency-{seed}-{problem.id}"))


@cache
def _knowledge_wordings() -> dict[tuple[str, str], list[str]]:
    """(entity, relation) -> the prompts of every question about that fact."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem, _ in chain(knowledge.one_step_questions(), knowledge.two_step_questions()):
        found[_fact(problem)].append(problem.prompt)
    return dict(found)


def _fact(problem: Problem) -> tuple[str, str]:
    return problem.meta["entity"], problem.meta["relation"]


def _facts(items: int, seed: int) -> tuple[Problem, ...]:
    return first_distinct(knowledge.problems("evaluation", seed), items, _fact, "knowledge (facts)")


def paraphrase_knowledge(items: int, seed: int) -> list[Question]:
    return [
        _question("paraphrase_knowledge", problem, _choice(problem, seed), _knowledge_wordings()[_fact(problem)])
        for problem in _facts(items, seed)
    ]


def listed(question: str, choices: Sequence[str]) -> str:
    """A knowledge question with its choices in it: ``What is the trade of Bado: wool, salt, wine or oil?``"""
    *most, last = (choice.strip() for choice in choices)
    stem, mark, rest = question.rpartition("?")
    return f"{stem}: {', '.join(most)} or {last}{mark}{rest}"


def permutation_knowledge(items: int, seed: int) -> list[Question]:
    questions = []
    for problem in _facts(items, seed):
        choice = _choice(problem, seed)
        orders = rotations(choice.choices)
        contexts = [listed(problem.prompt, [choice.choices[place] for place in order]) for order in orders]
        questions.append(_question("permutation_knowledge", problem, choice, contexts))
    return questions


def _steps(problem: Problem) -> list[code.Step]:
    return [
        (PRIMITIVES[name], constant)
        for name, constant in zip(problem.meta["primitives"], problem.meta["constants"], strict=True)
    ]


def _phrases(problem: Problem) -> list[str]:
    """The phrase that the problem's prompt has for each of its steps."""
    steps = _steps(problem)
    every = product(*(primitive.phrases for primitive, _ in steps))
    return list(next(phrases for phrases in every if code.write_prompt(steps, phrases) == problem.prompt))


def paraphrase_code(items: int, seed: int) -> list[Question]:
    questions = []
    for problem in evaluation_problems("code", items, seed):
        steps, used = _steps(problem), _phrases(problem)
        others = [next(p for p in step.phrases if p != own) for (step, _), own in zip(steps, used, strict=True)]
        contexts = [problem.prompt, code.write_prompt(steps, others)]
        questions.append(_question("paraphrase_code", problem, _choice(problem, seed), contexts))
    return questions


def _opposed(primitive: Primitive) -> tuple[str, str]:
    """A phrase of the primitive, and the same with "drop" for "keep" (or the other way), which means its complement."""

    def phrase(one: Primitive, keeps: bool) -> str | None:
        return next((text for text in one.phrases if text.startswith("keep") is keeps), None)

    other = PRIMITIVES[COMPLEMENT[primitive.name]]
    keeps = phrase(primitive, True) is not None
    own, opposite = phrase(primitive, keeps), phrase(other, not keeps)
    assert own is not None and opposite is not None
    return own, opposite


def _negated(problem: Problem) -> Question | None:
    """The problem and its negation; None where none of its steps has one, or where it makes no difference."""
    steps = _steps(problem)
    at = next((i for i, (primitive, _) in enumerate(steps) if primitive.name in COMPLEMENT), None)
    if at is None:
        return None
    primitive, constant = steps[at]
    turned = [*steps[:at], (PRIMITIVES[COMPLEMENT[primitive.name]], constant), *steps[at + 1 :]]
    if all(code.run_steps(turned, value) == expected for value, expected in problem.meta["tests"]):
        return None
    phrases = _phrases(problem)
    own, opposite = _opposed(primitive)
    contexts = [
        code.write_prompt(chain_of, [*phrases[:at], phrase, *phrases[at + 1 :]])
        for chain_of, phrase in ((steps, own), (turned, opposite))
    ]
    programs = (code.write_answer(steps), code.write_answer(turned))
    # Answer 0 is the program that was asked for: the first one of the question, the second one of its negation.
    wordings = (Wording(contexts[0], programs, (0, 1)), Wording(contexts[1], programs, (1, 0)))
    return Question(f"negation_code-{problem.id}", "negation_code", wordings, 0)


def negation_code(items: int, seed: int) -> list[Question]:
    stream: Iterator[Question] = (
        question for problem in code.problems("evaluation", seed) if (question := _negated(problem)) is not None
    )
    return list(first_distinct(stream, items, lambda question: question.wordings, "code (negations)"))


FORMS: dict[str, Callable[[int, int], list[Question]]] = {
    "paraphrase_knowledge": paraphrase_knowledge,
    "paraphrase_code": paraphrase_code,
    "negation_code": negation_code,
    "permutation_knowledge": permutation_knowledge,
}


@lru_cache(maxsize=16)
def evaluation_questions(form: str, items: int, seed: int) -> tuple[Question, ...]:
    """The questions of one form, the same for every cell. Raises WinnowError where there are not as many."""
    return tuple(FORMS[form](items, seed))


@dataclass(frozen=True)
class ConsistencyTask(ModelTask):
    """Consistency of the answers to reference questions, see ``ask``; the domains of its scores are the forms above.

    ``items`` is the number of questions of each form.
    """

    kind: ClassVar[str] = "probe"
    version: ClassVar[int] = 1

    items: int = 250
    seed: int = 0
    forms: tuple[str, ...] = tuple(FORMS)
    name: str = "consistency"
    domain: str = ""

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return Need(counter.longest_pair(asked(counter, self._questions())))

    def run(self, backend: Backend) -> TaskResult:
        return ask(backend, self.name, self._questions(), self.seed)

    def _questions(self) -> list[Question]:
        return [q for form in self.forms for q in evaluation_questions(form, self.items, self.seed)]
