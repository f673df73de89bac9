"""Records of before: what their scores did not say yet, from one table.

Version 1 called the part of a task its domain, and said neither what kind of score one is nor what it is about.
"""

from typing import Any

GENERATIVE, CHOICE, PERPLEXITY, PROBE = "generative", "choice", "perplexity", "probe"
# Task -> kind and domain of its scores.
_TASKS = {
    "code": (GENERATIVE, "code"),
    "math": (GENERATIVE, "math"),
    "writing": (GENERATIVE, "writing"),
    "multiple_choice": (CHOICE, "knowledge"),
    "perplexity": (PERPLEXITY, "language"),
    **dict.fromkeys(("diversity", "generation", "drift", "calibration_error", "consistency", "layers"), (PROBE, "")),
    **dict.fromkeys(("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "livecodebench"), (GENERATIVE, "code")),
    **dict.fromkeys(("gsm8k", "math_500"), (GENERATIVE, "math")),
    **dict.fromkeys(("wildbench", "writingbench"), (PROBE, "writing")),  # their length: verdicts are tasks of their own
    **dict.fromkeys(("wikitext", "c4"), (PERPLEXITY, "language")),
    **dict.fromkeys(("winogrande", "boolq", "hellaswag", "rte", "lambada"), (CHOICE, "language")),
    **dict.fromkeys(("arc_challenge", "arc_easy", "mmlu", "openbookqa", "piqa"), (CHOICE, "knowledge")),
    **dict.fromkeys(("arc_challenge_order", "mmlu_order"), (PROBE, "knowledge")),
}
# By metric, of any other task, and where a task has scores of two kinds.
_METRICS = {
    "acc": CHOICE, "acc_norm": CHOICE, "pass@1": GENERATIVE, "exact_match": GENERATIVE, "perplexity": PERPLEXITY,
    "word_perplexity": PERPLEXITY, "byte_perplexity": PERPLEXITY, "bits_per_byte": PERPLEXITY,
}  # fmt: skip
_STRICTER = {"humaneval_plus": "humaneval", "mbpp_plus": "mbpp"}


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a record, of whatever version, as of today."""
    return data if data["version"] > 1 else {**data, "scores": [upgraded_score(one) for one in data["scores"]]}


def upgraded_score(score: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a score, of whatever version, as of today."""
    if "kind" in score:
        return score
    task, metric = score["task"], score["metric"].partition(",")[0]
    kind, domain = _TASKS.get(task, ("", ""))
    if not kind or (kind == CHOICE and _METRICS.get(metric) == PERPLEXITY):
        kind = _METRICS.get(metric, PROBE)
    said = {"part": score.get("domain", ""), "kind": kind, "domain": domain, "supersedes": _STRICTER.get(task, "")}
    return {key: value for key, value in score.items() if key != "domain"} | said
