"""What the scores of records made by hand say of themselves, as the tasks of these names would have them say."""

from collections.abc import Iterable
from dataclasses import replace

from harness.contracts.record import Score

KINDS = {
    "code": ("generative", "code"),
    "math": ("generative", "math"),
    "writing": ("generative", "writing"),
    "humaneval": ("generative", "code"),
    "mbpp": ("generative", "code"),
    "gsm8k": ("generative", "math"),
    "multiple_choice": ("choice", "knowledge"),
    "perplexity": ("perplexity", "language"),
}


def with_kinds(scores: Iterable[Score]) -> list[Score]:
    """Scores of any other task are a probe's, unless they say what they are."""
    found = []
    for score in scores:
        kind, domain = KINDS.get(score.task, ("probe", ""))
        found.append(score if score.kind else replace(score, kind=kind, domain=domain))
    return found
