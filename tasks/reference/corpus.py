"""The reference texts by domain: training documents for the reference MoE, calibration corpora for its compression."""

import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice

from harness.data.rows import Document
from harness.errors import WinnowError
from tasks.reference import code, knowledge, math, real_text, writing
from tasks.reference.problem import Problem, Split

DOMAINS = ("code", "math", "writing", "knowledge", "real_text")
_PROBLEMS = {
    "code": code.problems,
    "math": math.problems,
    "writing": writing.problems,
    "knowledge": knowledge.problems,
}


def training_documents(domain: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) pairs of the training split; real text has no prompt, and one piece in four is prose."""
    if domain in _PROBLEMS:
        for problem in _PROBLEMS[domain]("train", seed):
            yield problem.prompt, problem.answer
        return
    pieces = {kind: real_text.documents("train", seed, kind) for kind in real_text.KINDS}
    rng = random.Random(f"real_text-mix-{seed}")
    while True:
        yield "", next(pieces["prose" if rng.random() < 0.25 else "python"])


def texts(domain: str, split: Split, count: int, seed: int) -> list[str]:
    """At most ``count`` documents of a domain, prompt and answer together."""
    if domain == "real_text":
        return list(islice(real_text.documents(split, seed), count))
    if domain not in _PROBLEMS:
        raise WinnowError(f"unknown reference domain '{domain}'; known: {', '.join(DOMAINS)}")
    distinct: dict[str, Problem] = {}
    for problem in islice(_PROBLEMS[domain](split, seed), 4 * count):
        distinct.setdefault(problem.id, problem)
        if len(distinct) == count:
            break
    return [problem.text for problem in distinct.values()]


def calibration_corpus(parts: Mapping[str, int], seed: int) -> list[Document]:
    """Calibration documents of the reference domains: so many of each, labelled with their domain."""
    return list(_documents(tuple(parts.items()), seed))


@lru_cache(maxsize=4)  # a second of work, that the cells of a process share
def _documents(parts: tuple[tuple[str, int], ...], seed: int) -> tuple[Document, ...]:
    return tuple(
        Document(text, source=domain) for domain, count in parts for text in texts(domain, "calibration", count, seed)
    )
