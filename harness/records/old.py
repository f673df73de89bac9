"""Records of before: what their scores did not say yet, from one table.

Version 1 called the part of a task its domain, and said neither what kind of score one is nor what it is about.
"""

from fnmatch import fnmatchcase
from typing import Any

GENERATIVE, CHOICE, PERPLEXITY, PROBE = "generative", "choice", "perplexity", "probe"
# Task -> kind and domain of its scores. lm-eval's tasks are parts of a task that may be called anything.
_TASKS = {
    "code": (GENERATIVE, "code"),
    "math": (GENERATIVE, "math"),
    "writing": (GENERATIVE, "writing"),
    "multiple_choice": (CHOICE, "knowledge"),
    "perplexity": (PERPLEXITY, "language"),
    **dict.fromkeys(("diversity", "generation", "drift", "calibration_error", "consistency", "layers"), (PROBE, "")),
    **dict.fromkeys(("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "livecodebench"), (GENERATIVE, "code")),
    **dict.fromkeys(("gsm8k", "math_500"), (GENERATIVE, "math")),
    # Their length, a number from 1 to 10 and what is missing are no shares.
    **dict.fromkeys(
        (f"{name}{what}" for name in ("wildbench", "writingbench") for what in ("", "_rubric", "_missing")),
        (PROBE, "writing"),
    ),
    **dict.fromkeys(("wildbench_pairwise", "writingbench_pairwise"), (GENERATIVE, "writing")),
    **dict.fromkeys(("wikitext", "c4"), (PERPLEXITY, "language")),
    **dict.fromkeys(("winogrande", "boolq", "hellaswag", "rte", "lambada"), (CHOICE, "language")),
    **dict.fromkeys(("arc_challenge", "arc_easy", "mmlu", "openbookqa", "piqa"), (CHOICE, "knowledge")),
    **dict.fromkeys(("arc_challenge_order", "mmlu_order"), (PROBE, "knowledge")),
}
# By metric, of any other task; and the kind, where a task of choices has a perplexity besides.
_METRICS = {
    "acc*": (CHOICE, "knowledge"),
    "pass@1": (GENERATIVE, "code"),
    "exact_match": (GENERATIVE, "knowledge"),
    "*perplexity": (PERPLEXITY, "language"),
    "bits_per_byte": (PERPLEXITY, "language"),
}
_STRICTER = {"humaneval_plus": "humaneval", "mbpp_plus": "mbpp"}


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a record, of whatever version, as of today."""
    return data if data["version"] > 1 else {**data, "scores": [upgraded_score(one) for one in data["scores"]]}


def upgraded_score(score: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a score, of whatever version, as of today."""
    if "kind" in score:
        return score
    task, part = score["task"], score.get("domain", "")
    kind, domain = _kind_and_domain(task, part, score["metric"].partition(",")[0])
    said = {"part": part, "kind": kind, "domain": domain, "supersedes": _STRICTER.get(task, "")}
    return {key: value for key, value in score.items() if key != "domain"} | said


def _kind_and_domain(task: str, part: str, metric: str) -> tuple[str, str]:
    by_metric, about = next((one for name, one in _METRICS.items() if fnmatchcase(metric, name)), (PROBE, ""))
    if task not in _TASKS:
        return by_metric, _TASKS[part][1] if part in _TASKS and about else about
    kind, domain = _TASKS[task]
    return (PERPLEXITY if kind == CHOICE and by_metric == PERPLEXITY else kind), domain
