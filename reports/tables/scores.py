"""Tables: built once as text in cells, then written as Markdown or LaTeX; the main one also as numbers in
CSV.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from reports.numbers.baselines import absent, elsewhere, unmeasured
from reports.numbers.best import BOLD_NOTE, clearly_best
from reports.numbers.broken import faults
from reports.numbers.contrasts import Comparer
from reports.numbers.load import NO_CORPUS, Panel, Row
from reports.numbers.measures import (
    Result,
    Results,
    any_quantized,
    columns_of,
    memory_reduction,
    parameters_removed,
    part_measures,
    weights_megabytes,
)
from reports.numbers.probes import diagnostic_measures
from reports.numbers.statistics import Measure, Part, find_score
from reports.numbers.usage import Usage, half_overlap, top_quarter_share
from reports.numbers.versions import mixed_engines
from reports.tables.formats import (
    MISSING,
    Table,
    format_estimate,
    format_list,
    format_number,
    format_span,
    in_csv,
)

_REDUCTION = (
    " Memory reduction is the size of the uncompressed model's weights in 16 bits over that of the row's, as stored "
    "(packed integers with their scales and zero points)."
)


def main_table(results: Results, corpus: str, comparer: Comparer | None = None) -> Table:
    """Scores with their intervals, by method and ratio."""
    measures = results.main
    rows = _rows_of(results.panel, corpus)
    quantized = any_quantized(rows)
    body = [
        _names(row)
        + [_score_text(measure, results.get(row, measure)) for measure in measures]
        + [format_number(weights_megabytes(row), 1), format_number(parameters_removed(row), 1, 100)]
        + ([format_number(memory_reduction(row), 2)] if quantized else [])
        for row in rows
    ]
    header = [
        "ratio",
        "method",
        *(_header(m) for m in measures),
        "size (MB)",
        "expert parameters removed (%)",
        *(["memory reduction (×)"] if quantized else []),
    ]
    ranked = [(place, measure) for place, measure in enumerate(measures, 2) if measure.ranked]
    note = _main_note(results, rows) + (_REDUCTION if quantized else "")
    return Table("Scores", header, body, note, _best(results, rows, ranked, comparer))


def difference_table(results: Results, corpus: str) -> Table | None:
    """Differences from the uncompressed model; None without one."""
    if results.panel.baseline is None:
        return None
    measures = results.main
    rows = results.panel.of_corpus(corpus)
    body = [_names(row) + [_difference_text(m, results.get(row, m)) for m in measures] for row in rows]
    header = ["ratio", "method", *(_header(m, difference=True) for m in measures)]
    return Table("Differences from the baseline", header, body, _difference_note(results, rows, measures))


def domain_table(results: Results, corpus: str, comparer: Comparer | None = None) -> Table | None:
    """Multiple choice and perplexity by the parts of their tasks (a task calls them its domains); None without any."""
    stand = (results.averages.choice, results.averages.perplexity)
    choices, texts = ([] if m is None else part_measures(results.panel.records(), m) for m in stand)
    measures = choices + texts
    if not measures:
        return None
    rows = _rows_of(results.panel, corpus)
    body = [_names(row) + [_score_text(m, results.get(row, m)) for m in measures] for row in rows]
    header = [f"choice: {m.label} (%)" for m in choices] + [f"perplexity: {m.label}" for m in texts]
    note = (
        "Multiple choice is the share of questions whose right answer has the highest log-likelihood; "
        "perplexity is per token of held-out text; 95 % intervals as recorded by the task (n: "
        f"{_counts(measures, rows)}).{_seed_sentence(rows)} {BOLD_NOTE.capitalize()}."
        f"{_sentences(absent(results.panel))}"
    )
    best = _best(results, rows, list(enumerate(measures, 2)), comparer)
    return Table("Scores by domain", ["ratio", "method", *header], body, note, best)


def scores_table(results: Results, corpus: str, title: str, measures: Sequence[Measure], note: str) -> Table:
    """The measures of a corpus's rows; of those that are ranked, what is clearly the best of its ratio is in bold."""
    rows = _rows_of(results.panel, corpus)
    body = [_names(row) + [_score_text(m, results.get(row, m)) for m in measures] for row in rows]
    ranked = [(place, measure) for place, measure in enumerate(measures, 2) if measure.ranked]
    header = ["ratio", "method", *map(_header, measures)]
    return Table(title, header, body, note + _sentences(absent(results.panel)), _best(results, rows, ranked))


def cost_table(panel: Panel) -> Table:
    """Sizes on disk, parameters, and the seconds of each stage."""
    rows = panel.all_rows()
    stages = list(dict.fromkeys(stage for row in rows for record in row.records for stage in record.timings))
    header = [
        "ratio",
        "method",
        "corpus",
        "size (MB)",
        "parameters (M)",
        "expert parameters (M)",
        "removed (%)",
    ]
    body = []
    for row in rows:
        sizes = row.records[0].sizes
        seconds = [[r.timings[stage] for r in row.records if stage in r.timings] for stage in stages]
        body.append(
            _names(row)
            + [
                row.calibration if row.calibration != NO_CORPUS else MISSING,
                format_number(weights_megabytes(row), 1),
            ]
            + [format_number(sizes.get(key), 2, 1e-6) for key in ("parameters", "expert_parameters")]
            + [format_number(parameters_removed(row), 1, 100)]
            + [format_number(sum(values) / len(values) if values else None, 1) for values in seconds]
        )
    note = (
        "MB are 10^6 bytes of weights on disk, M are 10^6 parameters, removed is the fraction of "
        "routed-expert parameters that the checkpoint no longer stores; seconds are wall time, the mean "
        f"over seeds where there are several (n: {sum(len(row.records) for row in rows)} cells in "
        f"{len(rows)} rows); a stage that was reused from an earlier cell takes next to none."
        f"{_sentences(absent(panel), elsewhere(panel))}"
    )
    return Table("Sizes and timings", header + [f"{stage} (s)" for stage in stages], body, note)


def usage_table(usage: Usage) -> Table:
    """How concentrated routing is by source, and how much the sources' favourite experts overlap."""
    overlap = half_overlap(usage)
    both_ways = overlap | {(other, one): value for (one, other), value in overlap.items()}
    body = [
        [source, format_number(top_quarter_share(usage[source]), 1, 100)]
        + ["1" if source == other else format_number(both_ways.get((source, other)), 2) for other in usage]
        for source in usage
    ]
    tokens = {int(round(counts.sum())) for layers in usage.values() for counts in layers.values()}
    layers = {len(layers) for layers in usage.values()}
    note = (
        "The share of a layer's routed tokens that its most used quarter of experts takes, and the overlap "
        "(Jaccard index) of the most used halves of experts between two sources; both in the uncompressed "
        f"model, mean over layers (n: {format_span(layers)} MoE layers, {format_span(tokens)} routed tokens "
        "a layer). Halves drawn at random overlap by about 0.33."
    )
    header = [
        "source",
        "tokens of the most used quarter (%)",
        *(f"overlap with {source}" for source in usage),
    ]
    return Table("Expert usage", header, body, note)


def to_csv(all_results: Sequence[Results]) -> str:
    """The main table, its differences and the diagnostics as plain numbers: shares from 0 to 1, sizes in bytes, empty
    if unknown.
    """
    names = (
        "value",
        "low",
        "high",
        "n",
        "difference",
        "difference_low",
        "difference_high",
        "difference_paired",
    )
    columns = (m for r in all_results for m in [*r.main, *diagnostic_measures(r.panel.records())])
    measures = list({m.name: m for m in columns}.values())
    quantized = any_quantized(row for results in all_results for row in results.panel.rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "suite", "backend", "calibration", "ratio", "method", "seeds", "weights_bytes"]
        + ["expert_parameters_removed", *(["memory_reduction"] if quantized else [])]
        + [in_csv(f"{m.name}_{name}") for m in measures for name in names]
    )
    for results in all_results:
        panel = results.panel
        for row in panel.all_rows():
            removed = parameters_removed(row)
            line = [in_csv(name) for name in (panel.model, panel.suite, panel.backend, row.calibration)]
            line += [f"{row.ratio:g}", in_csv(row.method)]
            line += [str(len(row.records)), str(row.records[0].sizes.get("weights_bytes", ""))]
            line.append("" if removed is None else repr(removed))
            if quantized:
                reduction = memory_reduction(row)
                line.append("" if reduction is None else repr(reduction))
            for measure in measures:
                line += _csv_fields(results.get(row, measure))
            writer.writerow(line)
    return out.getvalue()


def _rows_of(panel: Panel, corpus: str) -> list[Row]:
    return ([] if panel.baseline is None else [panel.baseline]) + panel.of_corpus(corpus)


def _names(row: Row) -> list[str]:
    return [f"{row.ratio:g}", row.label]


def _header(measure: Measure, difference: bool = False) -> str:
    unit = (" (points)" if difference else " (%)") if measure.kind == "share" else ""
    return f"{'Δ ' if difference else ''}{measure.label}{unit}"


def _score_text(measure: Measure, result: Result | None) -> str:
    return MISSING if result is None else format_estimate(measure.kind, result.estimate)


def _difference_text(measure: Measure, result: Result | None) -> str:
    if result is None or result.difference is None:
        return MISSING
    return format_estimate(measure.kind, result.difference, signed=True)


def _best(
    results: Results,
    rows: Sequence[Row],
    columns: Sequence[tuple[int, Measure]],
    comparer: Comparer | None = None,
) -> set[tuple[int, int]]:
    """The places of what is clearly the best of its ratio, column by column."""
    known = comparer or Comparer()
    return {(place, column) for column, measure in columns for place in clearly_best(results, rows, measure, known)}


def _main_note(results: Results, rows: Sequence[Row]) -> str:
    note = (
        f"Each score with its 95 % interval as recorded by the task (n: {_counts(results.main, rows)}), in "
        "percent except perplexity (per token, lower is better) and diversity"
    )
    note = f"{note}{_averages_sentence(results)}; {BOLD_NOTE}; diversity is not ranked."
    note += f"{_seed_sentence(rows)}{_broken_sentence(rows)}{_odd_sentence(rows)}{_engines_sentence(rows)}"
    return note + _sentences(absent(results.panel), elsewhere(results.panel)) + _unmeasured_sentence(rows)


def _averages_sentence(results: Results) -> str:
    """Which tasks stand behind each average of the main table, and which tests of the same answers do not count."""
    stand, labels = results.averages, {m.parts: m.label for m in results.main}
    told = []
    if stand.generative in results.main and stand.generative is not None:
        several = any(len(measure.parts) > 1 for measure in stand.domains.values())
        of = [f"{name} ({_tasks(measure, labels)})" for name, measure in stand.domains.items()] if several else []
        told.append(
            f"the generative average is the mean of {format_list(of) if of else _tasks(stand.generative, labels)}, and "
            "its half-width the root of the sum of their squared half-widths over their number"
            + (" (each weighted as in the average)" if several else "")
        )
    told += [
        f"the {measure.label} is the {mean} of {_tasks(measure, labels)}"
        for measure, mean in ((stand.choice, "mean"), (stand.perplexity, "geometric mean"))
        if measure is not None and len(measure.parts) > 1
    ]
    columns = columns_of(results.panel.records())
    there = {column.part.task for column in columns}
    told += [
        f"of {c.supersedes} and {c.part.task}, tests of the same answers, {c.part.task} counts"
        for c in columns
        if c.supersedes in there
    ]
    return "".join(f"; {one}" for one in told)


def _tasks(measure: Measure, labels: Mapping[tuple[Part, ...], str]) -> str:
    return format_list([labels.get((part,), part.of or part.task).partition(": ")[0] for part in measure.parts])


def _difference_note(results: Results, rows: Sequence[Row], measures: Sequence[Measure]) -> str:
    paired, unpaired = (
        [
            m.label
            for m in measures
            if any(
                found.difference is not None and found.difference.paired is wanted
                for row in rows
                if (found := results.get(row, m)) is not None
            )
        ]
        for wanted in (True, False)
    )
    sources = []
    if paired:
        sources.append(
            "of its paired test over the items that both answered, each task by itself, for " + format_list(paired)
        )
    if unpaired:
        sources.append(
            "from the two recorded intervals, unpaired, for "
            + format_list(unpaired)
            + (" where samples are missing or do not carry the score" if set(paired) & set(unpaired) else "")
        )
    return (
        "The row's score less that of the uncompressed model, with a 95 % interval "
        f"{', and '.join(sources)} (n: {_counts(measures, rows)}); percent scores differ in points, and a "
        "perplexity's interval is that of the factor, times the baseline's."
        f"{_seed_sentence(rows)}{_sentences(elsewhere(results.panel))}"
    )


def _sentences(*told: str) -> str:
    """Each after a space, those that say something."""
    return "".join(f" {one}" for one in told if one)


def _unmeasured_sentence(rows: Sequence[Row]) -> str:
    told = unmeasured(rows)
    return f" Not measured: {'; '.join(told)}." if told else ""


def _seed_sentence(rows: Sequence[Row]) -> str:
    several = {row.method: len(row.records) for row in rows if len(row.records) > 1}
    if not several:
        return ""
    named = format_list([f"{method} ({count})" for method, count in sorted(several.items())])
    return (
        f" Rows of several seeds, {named}, are means over seeds (geometric for perplexity); their half-width "
        "adds in quadrature that of the items and Student's t times the standard error over seeds."
    )


def _broken_sentence(rows: Sequence[Row]) -> str:
    told = [f"{row.method}: {'; '.join(found)}" for row in rows for record in row.records if (found := faults(record))]
    return f" Broken: {'. '.join(told)}." if told else ""


def _odd_sentence(rows: Sequence[Row]) -> str:
    """Which rows were made from something else than the others, and so are not compared."""
    told = [f"{row.method} at {row.ratio:g} (other {' and '.join(row.odd)})" for row in rows if row.odd]
    return f" Compared with none that was made from something else: {format_list(told)}." if told else ""


def _engines_sentence(rows: Sequence[Row]) -> str:
    mixed = mixed_engines([record for row in rows for record in row.records])
    return f" The rows were made with different versions: {'; '.join(mixed)}." if mixed else ""


def _counts(measures: Iterable[Measure], rows: Sequence[Row]) -> str:
    """``code 250, perplexity 40``: the samples behind one cell's score."""
    counts = []
    for measure in measures:
        if len(measure.parts) > 1:
            continue
        scores = [find_score(record, measure.parts[0]) for row in rows for record in row.records]
        found = {score.n for score in scores if score is not None}
        if found and measure.name != "generative":
            task, of = measure.parts[0].task, measure.parts[0].of
            name = f"{task.replace('_', ' ')} {of}" if of not in ("", task) else measure.label
            counts.append(f"{name} {format_span(found)}")
    return ", ".join(counts) or "no scores"


def _csv_fields(result: Result | None) -> list[str]:
    if result is None:
        return [""] * 8
    value, compared = result.estimate, result.difference
    fields = [repr(value.value), repr(value.low), repr(value.high), str(value.n)]
    if compared is None:
        return fields + [""] * 4
    return fields + [
        repr(compared.value),
        repr(compared.low),
        repr(compared.high),
        str(compared.paired).lower(),
    ]
