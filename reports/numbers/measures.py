"""The columns of the reports, and their values for every row of a panel."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts.record import Record
from reports.numbers.load import Panel, Row, RowKey
from reports.numbers.statistics import Estimate, Measure, Part, difference, estimate, find_score

CODE = Measure("code", "code", (Part("code", "pass@1"),))
MATH = Measure("math", "math", (Part("math", "exact_match"),))
WRITING = Measure("writing", "writing", (Part("writing", "elements"),))
MULTIPLE_CHOICE = Measure("multiple_choice", "multiple choice", (Part("multiple_choice", "acc"),))
PERPLEXITY = Measure(
    "perplexity", "perplexity", (Part("perplexity", "perplexity"),), kind="perplexity", higher_is_better=False
)
# Not ranked: broken text can be as diverse as it likes.
DIVERSITY = Measure(
    "diversity", "3-gram diversity", (Part("diversity", "ngram_diversity_3"),), kind="number", ranked=False
)
GENERATIVE_TASKS = (CODE, MATH, WRITING)


def _drift(metric: str, label: str, kind: str, higher_is_better: bool = False, ranked: bool = True) -> Measure:
    return Measure(f"drift_{metric}", label, (Part("drift", metric),), kind, higher_is_better, ranked)


# Not ranked: entropies, where the texts part of a model that may seldom part, and the perplexity of text that may be
# likely because it loops.
DRIFT = (
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
GENERATION = (
    Measure("degenerate", "in a loop", (Part("generation", "degenerate"),), higher_is_better=False),
    Measure("empty", "empty", (Part("generation", "empty"),), higher_is_better=False),
    Measure("length", "length", (Part("generation", "length"),), kind="count", ranked=False),
    Measure(
        "self_repetition", "self-repetition", (Part("generation", "self_repetition"),),
        higher_is_better=False, ranked=False,
    ),
    *(
        Measure(f"{metric}_{n}", f"{label}{n}", (Part("diversity", f"{metric}_{n}"),), kind="number", ranked=False)
        for metric, label in (("ngram_diversity", "diversity-"), ("distinct", "distinct-"))
        for n in (2, 3, 4)
    ),
)  # fmt: skip


def _calibration(metric: str, label: str, ranked: bool = False) -> Measure:
    return Measure(metric, label, (Part("calibration_error", metric),), "number", False, ranked)


# Not ranked: what is a reference for the error, and what says only its direction.
CALIBRATION = (
    _calibration("ece", "ECE", ranked=True),
    _calibration("ece_adaptive", "adaptive ECE", ranked=True),
    _calibration("ece_by_chance", "ECE by chance"),
    _calibration("brier", "Brier score", ranked=True),
    _calibration("overconfidence", "overconfidence"),
)
_KNOWN_TASKS = {
    m.parts[0].task
    for m in (*GENERATIVE_TASKS, MULTIPLE_CHOICE, PERPLEXITY, DIVERSITY, *DRIFT, *GENERATION, *CALIBRATION)
} | {"layers"}  # which have tables of their own
_SHARES = {"acc", "acc_norm", "exact_match", "pass@1", "win_rate"}
# How long a text is, and how many verdicts are missing, say nothing of its worth.
_UNRANKED = {"characters", "verdicts"}
_DOMAINS = ("code", "math", "writing", "knowledge", "real_text")


@dataclass(frozen=True)
class Result:
    """``difference`` from the baseline: None for the baseline, without one, and where a score is missing."""

    estimate: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Results:
    """The results of a panel's rows, baseline included, and the measures that any of them has."""

    panel: Panel
    measures: tuple[Measure, ...]
    found: dict[tuple[RowKey, str], Result]

    def get(self, row: Row, measure: Measure) -> Result | None:
        return self.found.get((row.key, measure.name))

    def has(self, measure: Measure) -> bool:
        return measure in self.measures


def generative_average(records: Iterable[Record]) -> Measure | None:
    """The mean over those of the generative tasks that were run anywhere; None where none was."""
    kept = list(records)
    parts = [t.parts[0] for t in GENERATIVE_TASKS if any(find_score(record, t.parts[0]) for record in kept)]
    return Measure("generative", "generative average", tuple(parts)) if parts else None


def main_measures(records: Sequence[Record]) -> list[Measure]:
    """The columns of the main table that some record has a score for."""
    average = generative_average(records)
    columns = [CODE, MATH, WRITING, MULTIPLE_CHOICE, PERPLEXITY, DIVERSITY]
    present = [m for m in columns if any(find_score(record, m.parts[0]) for record in records)]
    return ([] if average is None else [average]) + present + _other_measures(records)


def _other_measures(records: Iterable[Record]) -> list[Measure]:
    """One column for each domain of the tasks that have none above, such as lm-eval's: its first metric, which is the
    one that its samples hold. The parts of a group that has a score over all of their items (mmlu_astronomy of mmlu)
    have none."""
    kept = list(records)
    known = _KNOWN_TASKS | {m.parts[0].task for m in consistency_measures(kept)}
    parts = {part for record in kept for part in _parts_of_groups(record)}
    firsts: dict[tuple[str, str], Measure] = {}
    for score in (score for record in kept for score in record.scores if score.task not in known):
        if (score.task, score.domain) in parts:
            continue
        label = score.domain or score.task
        measure = Measure(
            f"{score.task}_{label}",
            f"{label}: {score.metric}",
            (Part(score.task, score.metric, score.domain),),
            kind="share" if score.metric in _SHARES else "number",
            higher_is_better=score.higher_is_better,
            ranked=score.metric not in _UNRANKED,
        )
        firsts.setdefault((score.task, score.domain), measure)
    return list(firsts.values())


def _parts_of_groups(record: Record) -> Iterator[tuple[str, str]]:
    """(task, domain) of the parts of groups: two or more whose names go on from the group's, and whose items are as
    many as the group's. A task of its own that is only named like one (gsm8k_cot beside gsm8k) is none."""
    items = {(score.task, score.domain): score.n for score in record.scores if score.domain}
    for (task, group), n in items.items():
        parts = {of: m for of, m in items.items() if of[0] == task and of[1].startswith(f"{group}_")}
        if len(parts) > 1 and sum(parts.values()) == n:
            yield from parts


def domain_measures(records: Iterable[Record], whole: Measure) -> list[Measure]:
    """One measure a domain of a task, in the usual order, then by name."""
    task, metric = whole.parts[0].task, whole.parts[0].metric
    found = {s.domain for record in records for s in record.scores if (s.task, s.metric) == (task, metric)} - {""}
    ordered = [name for name in _DOMAINS if name in found] + sorted(found - set(_DOMAINS))
    return [
        Measure(
            f"{whole.name}_{domain}",
            domain.replace("_", " "),
            (Part(task, metric, domain),),
            whole.kind,
            whole.higher_is_better,
        )
        for domain in ordered
    ]


def consistency_measures(records: Iterable[Record]) -> list[Measure]:
    """For each way to ask again: how many questions got the same answer, and the accuracy beside it."""
    found = {
        (s.task, s.domain): None for record in records for s in record.scores if s.metric == "consistent"
    }  # in the order of the tasks
    return [
        Measure(f"{task}_{domain}_{metric}", f"{_form(task, domain)}: {label}", (Part(task, metric, domain),))
        for task, domain in found
        for metric, label in (("consistent", "same answer"), ("acc", "accuracy"))
    ]


def _form(task: str, domain: str) -> str:
    return (domain if task == "consistency" else task).replace("_", " ")


def diagnostic_measures(records: Sequence[Record]) -> list[Measure]:
    """Drift, what is to say of the texts, calibration and consistency, where some record has a score for it."""
    found = {(score.task, score.metric) for record in records for score in record.scores}
    tasks = {task for task, _ in found}
    kept = DRIFT * ("drift" in tasks) + GENERATION * ("generation" in tasks) + CALIBRATION
    known = [m for m in kept if (m.parts[0].task, m.parts[0].metric) in found]
    return known + consistency_measures(records)


def evaluate(panel: Panel) -> Results:
    records = [record for row in panel.all_rows() for record in row.records]
    measures = main_measures(records)
    for whole in (MULTIPLE_CHOICE, PERPLEXITY):
        measures += domain_measures(records, whole)
    measures += diagnostic_measures(records)
    found: dict[tuple[RowKey, str], Result] = {}
    # Measure by measure, since all rows share the resamples of a measure.
    for measure in measures:
        for row in panel.all_rows():
            value = estimate(measure, row.records)
            if value is not None:
                compared = None if row is panel.baseline else _difference(measure, row, panel.baseline)
                found[(row.key, measure.name)] = Result(value, compared)
    return Results(panel, tuple(measures), found)


def _difference(measure: Measure, row: Row, baseline: Row | None) -> Estimate | None:
    if baseline is None:
        return None
    return difference(measure, row.records, baseline.records[0], row.items, baseline.items[0])


def parameters_removed(row: Row) -> float | None:
    """The fraction of routed-expert parameters that the first seed's cell no longer has."""
    sizes = row.records[0].sizes
    now, before = sizes.get("expert_parameters"), sizes.get("baseline_expert_parameters")
    if now is None or not before:
        return None
    return 1 - now / before


def weights_megabytes(row: Row) -> float | None:
    """Size of the weights on disk in MB of 10^6 bytes, of the first seed's cell."""
    size = row.records[0].sizes.get("weights_bytes")
    return None if size is None else size / 1e6


def memory_reduction(row: Row) -> float | None:
    """``times_smaller`` of the first seed's cell."""
    return times_smaller(row.records[0].sizes)


def times_smaller(sizes: Mapping[str, Any]) -> float | None:
    """How many times the weights on disk go into those of the uncompressed model in 16 bits; None where unknown."""
    names = ("weights_bytes", "baseline_weights_bytes", "baseline_parameters")
    now, before, count = (sizes.get(name) for name in names)
    if not now or not before:
        return None
    if count and before > 3 * count:  # it is stored in 32 bits
        before = 2 * count
    return before / now


def any_quantized(rows: Iterable[Row]) -> bool:
    return any(record.cell.get("quantize") for row in rows for record in row.records)
