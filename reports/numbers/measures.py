"""The columns of the reports, and their values for every row of a panel.

Columns and averages ask for the kind and the domain of a score, never for the name of a task: so the same report serves
the reference suite, the papers' suites and a user's own. Probes have tables of their own (``reports.numbers.probes``).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.contracts.record import Record, Score
from reports.numbers.contrasts import Comparer
from reports.numbers.differences import row_difference
from reports.numbers.load import Panel, Row, RowKey
from reports.numbers.probes import NGRAM_DIVERSITY, diagnostic_measures, has_diversity, tabled_tasks
from reports.numbers.statistics import Estimate, Measure, Part, estimate

GENERATIVE, CHOICE, PERPLEXITY, PROBE = "generative", "choice", "perplexity", "probe"
_KINDS = (GENERATIVE, CHOICE, PERPLEXITY)
# What people call a kind, where a task of that name is labelled by it alone.
_SAID = {CHOICE: "multiple_choice", PERPLEXITY: "perplexity"}
# Name and label of the average over a kind, which no task's column may have too.
_AVERAGES = {
    GENERATIVE: ("generative", "generative average"),
    CHOICE: ("choice_average", "choice average"),
    PERPLEXITY: ("perplexity_average", "perplexity average"),
}
_DOMAINS = ("code", "math", "writing", "knowledge", "real_text")
_SHARES = {"acc", "acc_norm", "exact_match", "pass@1", "win_rate", "share", "elements", "truncated"}
# How long a text is, and how many verdicts are missing, say nothing of its worth.
_UNRANKED = {"characters", "verdicts"}

# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """What stands for a task in tables and averages: its first score, which is the one that its samples hold."""

    measure: Measure
    kind: str
    domain: str
    supersedes: str = ""

    @property
    def part(self) -> Part:
        return self.measure.parts[0]


def columns_of(records: Iterable[Record]) -> list[Column]:
    """A column for each task that some record has scored, by kind, domain and the order of the records.

    A task is scored as a whole, or (as lm-eval's) by parts that are tasks themselves; parts of a group that has a score
    over all of their items (mmlu_astronomy of mmlu) have no column.
    """
    kept = list(records)
    hidden = {part for record in kept for part in _parts_of_groups(record)}
    whole = {score.task for record in kept for score in record.scores if not score.part}
    elsewhere = tabled_tasks(kept)
    found: dict[tuple[str, str], Column] = {}
    for score in (score for record in kept for score in record.scores):
        own_part = bool(score.part) and score.task in whole
        if score.task in elsewhere or own_part or (score.task, score.part) in hidden:
            continue
        column = Column(_measure(score), score.kind, score.domain, score.supersedes)
        before = found.get((score.task, score.part))
        if before is None or (before.kind == PROBE and score.kind != PROBE):
            found[(score.task, score.part)] = column
    return sorted(found.values(), key=lambda column: (_place(column.kind, (*_KINDS, PROBE)), _domain_place(column)))


def _measure(score: Score) -> Measure:
    name = score.part or score.task
    said = name in (score.domain, _SAID.get(score.kind))
    metric = score.metric.partition(",")[0]  # lm-eval's, without its filter
    if score.kind == PERPLEXITY:
        kind = "number" if metric == "bits_per_byte" else "perplexity"
    else:
        kind = "share" if metric in _SHARES else "number"
    return Measure(
        name if said else f"{score.task}_{name}",
        name.replace("_", " ") if said else f"{name}: {score.metric}",
        (Part(score.task, score.metric, score.part),),
        kind,
        score.higher_is_better,
        score.metric not in _UNRANKED,
    )


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _domain_place(column: Column) -> int:
    return _place(column.domain, _DOMAINS) if column.kind == GENERATIVE else 0


def _parts_of_groups(record: Record) -> Iterator[tuple[str, str]]:
    """(task, part) of the parts of groups: two or more whose names go on from the group's, and whose items are as
    many as the group's. A task of its own that is only named like one (gsm8k_cot beside gsm8k) is none."""
    items = {(score.task, score.part): score.n for score in record.scores if score.part}
    for (task, group), n in items.items():
        parts = {of: m for of, m in items.items() if of[0] == task and of[1].startswith(f"{group}_")}
        if len(parts) > 1 and sum(parts.values()) == n:
            yield from parts


# --- averages ---------------------------------------------------------------------------------------------------------


def average(columns: Sequence[Column], kind: str, domain: str = "") -> Measure | None:
    """The mean over the tasks of a kind (and domain); None where there is none.

    Generative: over domains, of the mean over a domain's tasks. Perplexity: the geometric mean. Of two tests of the
    same answers the stricter counts.
    """
    of_kind = [c for c in columns if c.kind == kind and c.measure.kind != "number" and domain in ("", c.domain)]
    superseded = {c.supersedes for c in of_kind} - {""}
    counted = [c for c in of_kind if (c.part.of or c.part.task) not in superseded]
    if not counted:
        return None
    domains = [c.domain if kind == GENERATIVE else "" for c in counted]
    weights = tuple(1 / (len(set(domains)) * domains.count(own)) for own in domains)
    first = counted[0].measure
    name, label = (f"{domain}_average", domain) if domain else _AVERAGES[kind]
    return Measure(
        name, label, tuple(c.part for c in counted), first.kind, first.higher_is_better,
        weights=weights if len(counted) > 1 else (),
    )  # fmt: skip


def is_average(measure: Measure) -> bool:
    """Whether it is one of a kind of task; the generative one is, even of a single task."""
    return len(measure.parts) > 1 or (measure.name, measure.label) == _AVERAGES[GENERATIVE]


@dataclass(frozen=True)
class Averages:
    """What stands for a kind of task: the average, or the column of its one task. None where there is none.

    ``domains`` holds those of the generative tasks by domain; ``texts`` the columns of perplexity.
    """

    generative: Measure | None
    choice: Measure | None
    perplexity: Measure | None
    domains: Mapping[str, Measure] = field(default_factory=dict)
    texts: tuple[Measure, ...] = ()


def averages(columns: Sequence[Column]) -> Averages:
    def of(kind: str, domain: str = "") -> Measure | None:
        found = average(columns, kind, domain)
        if found is None or len(found.parts) > 1:
            return found
        return next(c.measure for c in columns if c.part == found.parts[0])

    domains = dict.fromkeys(c.domain for c in columns if c.kind == GENERATIVE)
    return Averages(
        average(columns, GENERATIVE),
        of(CHOICE),
        of(PERPLEXITY),
        {domain: measure for domain in domains if (measure := of(GENERATIVE, domain)) is not None},
        tuple(c.measure for c in columns if c.kind == c.measure.kind == PERPLEXITY),
    )


def reference_columns(records: Sequence[Record], baseline: Record | None) -> list[Column]:
    """The columns that averages are over: those of the baseline, where there is one."""
    return columns_of(records if baseline is None else [baseline])


def main_measures(records: Sequence[Record], baseline: Record | None = None) -> list[Measure]:
    """The columns of the main table that some record has a score for: averages before what they average.

    An average over a single task of its kind is not repeated, but for the generative one, which is the main column.
    """
    columns = columns_of(records)
    found = averages(reference_columns(records, baseline))
    heads = {GENERATIVE: found.generative, CHOICE: found.choice, PERPLEXITY: found.perplexity}
    measures: list[Measure] = []
    for kind, head in heads.items():
        own = [column.measure for column in columns if column.kind == kind]
        measures += [head] if head is not None and (kind == GENERATIVE or len(head.parts) > 1) else []
        measures += own
    diverse = [NGRAM_DIVERSITY] * has_diversity(records)
    return [*measures, *diverse, *(c.measure for c in columns if c.kind not in heads)]


def part_measures(records: Iterable[Record], whole: Measure) -> list[Measure]:
    """One measure a part of the tasks that ``whole`` is made of, in the usual order, then by name."""
    kept = list(records)
    measures = []
    for task, metric in dict.fromkeys((part.task, part.metric) for part in whole.parts if not part.of):
        found = {s.part for record in kept for s in record.scores if (s.task, s.metric) == (task, metric)} - {""}
        for part in sorted(found, key=lambda name: (_place(name, _DOMAINS), name)):
            label, only = part.replace("_", " "), (Part(task, metric, part),)
            measures.append(Measure(f"{task}_{part}", label, only, whole.kind, whole.higher_is_better))
    return measures


# --- a panel's values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """``difference`` from the baseline: None for the baseline, without one, and where a score is missing."""

    estimate: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Results:
    """The results of a panel's rows, baseline included, and the measures that any of them has.

    ``main`` are the columns of the main table; ``averages`` stand for the kinds of task.
    """

    panel: Panel
    measures: tuple[Measure, ...] = ()
    found: Mapping[tuple[RowKey, str], Result] = field(default_factory=dict)
    main: tuple[Measure, ...] = ()
    averages: Averages = Averages(None, None, None)

    def get(self, row: Row, measure: Measure) -> Result | None:
        return self.found.get((row.key, measure.name))

    def has(self, measure: Measure) -> bool:
        return measure in self.measures


def evaluate(panel: Panel) -> Results:
    records = panel.records()
    baseline = panel.baseline_record()
    stand = averages(reference_columns(records, baseline))
    main = main_measures(records, baseline)
    parts = [
        m for whole in (stand.choice, stand.perplexity) if whole is not None for m in part_measures(records, whole)
    ]
    measures = list(
        {m.name: m for m in (*main, *parts, *diagnostic_measures(records), *stand.domains.values())}.values()
    )
    found: dict[tuple[RowKey, str], Result] = {}
    comparer = Comparer()
    for measure in measures:
        for row in panel.all_rows():
            value = estimate(measure, row.records)
            if value is not None:
                base = None if row is panel.baseline else panel.baseline
                compared = None if base is None else row_difference(measure, row, base, comparer)
                found[(row.key, measure.name)] = Result(value, compared)
    return Results(panel, tuple(measures), found, tuple(main), stand)


# --- sizes ------------------------------------------------------------------------------------------------------------


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
