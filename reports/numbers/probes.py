"""Probes: what is measured besides right answers, likely choices and likely text. They have tables of their own, and
the reports name their tasks here alone.
"""

from collections.abc import Iterable, Sequence

from harness.contracts.record import Record
from reports.numbers.statistics import Measure, Part

DIVERSITY, GENERATION, DRIFT = "diversity", "generation", "drift"
CALIBRATION_ERROR, CONSISTENCY, LAYERS = "calibration_error", "consistency", "layers"
# Whatever task has a score of this name puts its questions again.
_CONSISTENT = "consistent"

# Not ranked: broken text can be as diverse as it likes.
NGRAM_DIVERSITY = Measure(
    "diversity", "3-gram diversity", (Part(DIVERSITY, "ngram_diversity_3"),), kind="number", ranked=False
)


def _drift(metric: str, label: str, kind: str, higher_is_better: bool = False, ranked: bool = True) -> Measure:
    return Measure(f"drift_{metric}", label, (Part(DRIFT, metric),), kind, higher_is_better, ranked)


# Not ranked: entropies, where the texts part of a model that may seldom part, and the perplexity of text that may be
# likely because it loops.
DRIFT_MEASURES = (
    _drift("js", "JS divergence", "number"),
    _drift("free_js", "free-running JS divergence", "number"),
    _drift("kl_from_baseline", "KL(baseline ‖ model)", "number"),
    _drift("kl_to_baseline", "KL(model ‖ baseline)", "number"),
    _drift("esap", "ESAP", "share", higher_is_better=True),
    _drift("top1_agreement", "top-1 agreement", "share", higher_is_better=True),
    _drift("entropy", "entropy", "number", ranked=False),
    _drift("parting_position", "parting position", "count", ranked=False),
    _drift("same_text", "same text", "share", higher_is_better=True),
    _drift("cross_perplexity", "cross-perplexity", "perplexity", ranked=False),
)
# Not ranked: what broken text can have as much of as it likes, and how long a text is.
TEXT_MEASURES = (
    Measure("degenerate", "in a loop", (Part(GENERATION, "degenerate"),), higher_is_better=False),
    Measure("empty", "empty", (Part(GENERATION, "empty"),), higher_is_better=False),
    Measure("length", "length", (Part(GENERATION, "length"),), kind="count", ranked=False),
    Measure(
        "self_repetition", "self-repetition", (Part(GENERATION, "self_repetition"),),
        higher_is_better=False, ranked=False,
    ),
    *(
        Measure(f"{metric}_{n}", f"{label}{n}", (Part(DIVERSITY, f"{metric}_{n}"),), kind="number", ranked=False)
        for metric, label in (("ngram_diversity", "diversity-"), ("distinct", "distinct-"))
        for n in (2, 3, 4)
    ),
)  # fmt: skip


def _calibration(metric: str, label: str, ranked: bool = False) -> Measure:
    return Measure(metric, label, (Part(CALIBRATION_ERROR, metric),), "number", False, ranked)


# Not ranked: what is a reference for the error, and what says only its direction.
CALIBRATION_MEASURES = (
    _calibration("ece", "ECE", ranked=True),
    _calibration("ece_adaptive", "adaptive ECE", ranked=True),
    _calibration("ece_by_chance", "ECE by chance"),
    _calibration("brier", "Brier score", ranked=True),
    _calibration("overconfidence", "overconfidence"),
)


def tabled_tasks(records: Iterable[Record]) -> set[str]:
    """The tasks that have tables of their own, and so no columns beside the others."""
    ask_again = {s.task for record in records for s in record.scores if s.metric == _CONSISTENT}
    return {DIVERSITY, GENERATION, DRIFT, CALIBRATION_ERROR, LAYERS} | ask_again


def has_diversity(records: Iterable[Record]) -> bool:
    (part,) = NGRAM_DIVERSITY.parts
    return any((s.task, s.metric) == (part.task, part.metric) for record in records for s in record.scores)


def consistency_measures(records: Iterable[Record]) -> list[Measure]:
    """For each way to ask again: how many questions got the same answer, and the accuracy beside it."""
    found = {
        (s.task, s.part): None for record in records for s in record.scores if s.metric == _CONSISTENT
    }  # in the order of the tasks
    return [
        Measure(f"{task}_{part}_{metric}", f"{_form(task, part)}: {label}", (Part(task, metric, part),))
        for task, part in found
        for metric, label in ((_CONSISTENT, "same answer"), ("acc", "accuracy"))
    ]


def _form(task: str, part: str) -> str:
    return (part if task == CONSISTENCY else task).replace("_", " ")


def diagnostic_measures(records: Sequence[Record]) -> list[Measure]:
    """Drift, what is to say of the texts, calibration and consistency, where some record has a score for it."""
    found = {(score.task, score.metric) for record in records for score in record.scores}
    tasks = {task for task, _ in found}
    kept = DRIFT_MEASURES * (DRIFT in tasks) + TEXT_MEASURES * (GENERATION in tasks) + CALIBRATION_MEASURES
    known = [m for m in kept if (m.parts[0].task, m.parts[0].metric) in found]
    return known + consistency_measures(records)
