"""The result of one cell as plain text, for the end of a run. Needs neither torch nor a report."""

from collections.abc import Sequence

from harness.contracts.record import LEAVES, STAGES, Record, Sample
from harness.text import aligned
from reports.numbers.broken import faults
from reports.numbers.differences import difference
from reports.numbers.measures import (
    averages,
    main_measures,
    part_measures,
    reference_columns,
    times_smaller,
)
from reports.numbers.probes import diagnostic_measures
from reports.numbers.statistics import Items, Measure, estimate
from reports.tables.formats import MISSING, format_estimate


def cell_table(
    record: Record,
    baseline: Record | None = None,
    samples: Sequence[Sample] | None = None,
    baseline_samples: Sequence[Sample] | None = None,
) -> str:
    """Score, 95 % interval, baseline and difference, a line a measure; then size and expert parameters
    removed. What is broken or was not measured stands above, and that there is no baseline.

    Differences are paired where both lists of samples are given, by the rules of ``reports.numbers.differences``, so
    that they are the ones that a report will show.
    """
    stand = averages(reference_columns([record], baseline))
    of_parts = [m for whole in (stand.choice, stand.perplexity) if whole is not None for m in _named(record, whole)]
    compared = baseline is not None and record.cell["id"] != baseline.cell["id"]
    header = ["measure", "score [95 % interval]", "n", *(["baseline", "difference"] if compared else [])]
    items = None if samples is None else Items.from_samples(samples)
    baseline_items = None if baseline_samples is None else Items.from_samples(baseline_samples)
    lines = []
    for measure in main_measures([record], baseline) + of_parts + diagnostic_measures([record]):
        ours = estimate(measure, [record])
        if ours is None:
            continue
        line = [measure.label + _unit(measure), format_estimate(measure.kind, ours), str(ours.n)]
        if compared and baseline is not None:
            base = estimate(measure, [baseline])
            change = difference(measure, [record], baseline, [items], baseline_items)
            line.append(MISSING if base is None else format_estimate(measure.kind, base))
            line.append(MISSING if change is None else format_estimate(measure.kind, change, signed=True))
        lines.append(line)
    title = " ".join(
        f"{name}={record.cell[name]}"
        for name in ("model", "method", "ratio", LEAVES, *STAGES, "calibration", "seed")
        if record.cell.get(name) is not None
    )
    table = aligned([header, *lines], rule=True) if lines else "no scores (suite=none)"
    told = [f"broken: {fault}" for fault in faults(record)]
    told += [f"not measured: {task}: {why}" for task, why in record.not_measured.items()]
    if lines and baseline is None and not record.is_uncompressed():
        told.append("no baseline: there is no record of the uncompressed model to compare with")
    if baseline is not None and baseline.taken_from:
        told.append(f"baseline: evaluated elsewhere, taken from {baseline.taken_from}")
    return "\n".join([title, *told, table, *_size_lines(record)])


def _named(record: Record, whole: Measure) -> list[Measure]:
    return [
        Measure(m.name, f"  {whole.label}: {m.label}", m.parts, m.kind, m.higher_is_better)
        for m in part_measures([record], whole)
    ]


def _unit(measure: Measure) -> str:
    return " (%)" if measure.kind == "share" else ""


def _size_lines(record: Record) -> list[str]:
    sizes = record.sizes
    lines = []
    if "weights_bytes" in sizes:
        before = sizes.get("baseline_weights_bytes")
        was = f" (baseline {before / 1e6:.1f} MB)" if before else ""
        lines.append(f"weights on disk: {sizes['weights_bytes'] / 1e6:.1f} MB{was}")
    reduction = times_smaller(sizes)
    if record.cell.get("quantize") and reduction is not None:
        lines.append(f"memory reduction: {reduction:.2f}x against the uncompressed model in 16 bits")
    if "expert_parameters" in sizes and sizes.get("baseline_expert_parameters"):
        removed = 1 - sizes["expert_parameters"] / sizes["baseline_expert_parameters"]
        lines.append(f"routed-expert parameters removed: {100 * removed:.1f} %")
    return lines
