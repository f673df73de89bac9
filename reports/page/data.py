"""What the page shows, as plain data: every number comes from the results that the tables are made of.

A cell of the page is a row of the tables: the seeds of one setting together. Its texts, plan and saliency are those of
its first seed.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harness.contracts.record import Record
from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.figures.drift import PANELS, curve
from reports.figures.palette import looks
from reports.figures.reliability import reliability
from reports.numbers.baselines import absent, elsewhere, unmeasured
from reports.numbers.broken import faults
from reports.numbers.load import NO_CORPUS, Panel, Row
from reports.numbers.measures import (
    Results,
    memory_reduction,
    parameters_removed,
    weights_megabytes,
)
from reports.numbers.probes import CALIBRATION_MEASURES, consistency_measures, diagnostic_measures
from reports.numbers.statistics import Estimate, Measure
from reports.tables.formats import format_estimate
from reports.tables.layers import layer_numbers
from reports.tables.published import published_table

TEXTS = 4  # of each domain of a task
TEXT_LENGTH = 3000  # letters that are stored of a text
PROMPT_LENGTH = 1500
REMOVED, CONSTANT, MAP = -1, -2, -3  # an old expert that became no stored one; cell.js knows these too
LARGEST_PLAN = 8_000_000  # bytes of a plan.json that is still read, some 150,000 experts
NOTE = (
    "Scores and differences from the uncompressed model, which is grey, with 95 % intervals; a row is the mean over "
    "the seeds of one setting. The filter of a corpus keeps methods that need no calibration. How each score was "
    "computed is said under the tables of report.md, which tests the differences as well."
)
NOTE_ALONE = NOTE.replace("Scores and differences from the uncompressed model, which is grey, with", "Scores with")


class Pool:
    """Values that many cells share, stored once: cells hold their places."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def add(self, value: Any) -> int:
        key = json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def page_data(folder: Path, all_results: Sequence[Results], opening: str) -> dict[str, Any]:
    """Everything but the claims. ``folder`` is read for the texts, plans and saliency of the cells."""
    usage, saliency = Pool(), Pool()
    measures: dict[str, dict[str, Any]] = {}
    cells: list[dict[str, Any]] = []
    items = []
    for number, results in enumerate(all_results):
        panel = results.panel
        for measure in results.measures:
            measures.setdefault(measure.name, _measure(measure, results))
        chosen = choose_items(folder, panel)
        items.append(chosen)
        for row in panel.all_rows():
            cell = _cell(folder, results, row, chosen, alone=sum(len(r.panel.rows) for r in all_results) == 1)
            cell["usage"] = usage.add(row.records[0].expert_usage)
            cell["saliency"] = saliency.add(cell["saliency"])
            cells.append({"panel": number, "baseline": row is panel.baseline} | cell)
    methods = [cell["look"] for cell in cells if not cell["baseline"]]
    return {
        "opening": opening,
        "panels": [{"model": r.panel.model, "suite": r.panel.suite, "backend": r.panel.backend} for r in all_results],
        "measures": list(measures.values()),
        "cells": cells,
        "items": items,
        "usage": usage.values,
        "saliency": saliency.values,
        "looks": looks(methods),
        "curves": [{"metric": metric, "title": title} for metric, _, title in PANELS],
        "text_length": TEXT_LENGTH,
        "note": NOTE if any(r.panel.baseline is not None for r in all_results) else NOTE_ALONE,
        "published": _published(all_results),
    }


def choose_items(folder: Path, panel: Panel) -> list[dict[str, str]]:
    """The items whose texts are shown, the same for every cell: of each domain of a task the ``TEXTS`` longest that the
    uncompressed model wrote (where its texts are not kept, the first cell that has some). A text that two tasks score
    counts once.
    """
    for row in panel.all_rows():
        written = _read_samples(folder, row.records[0], ["output"])
        if written is None or not pc.any(pc.not_equal(written["output"], "")).as_py():
            continue
        table = samples_table(folder, row.records[0])
        assert table is not None  # it was read a moment ago
        seen: set[tuple[str, str]] = set()
        of_domain: dict[tuple[str, str], list[dict[str, str]]] = {}
        for sample in table.filter(pc.not_equal(table["output"], "")).to_pylist():
            if (sample["item"], sample["output"]) not in seen:
                seen.add((sample["item"], sample["output"]))
                of_domain.setdefault((sample["task"], sample["domain"]), []).append(sample)
        longest = [
            sample
            for samples in of_domain.values()
            for sample in sorted(samples, key=lambda s: (-len(s["output"]), s["item"]))[:TEXTS]
        ]
        return [
            {name: s[name] for name in ("task", "domain", "item")} | {"prompt": _cut(s["prompt"], PROMPT_LENGTH)}
            for s in longest
        ]
    return []


def samples_table(folder: Path, record: Record) -> pa.Table | None:
    """task, domain, item, score, output and prompt of a cell's samples; None where its parquet file is not kept."""
    table = _read_samples(folder, record)
    if table is None:
        return None
    if "prompt" not in table.column_names:  # records from before prompts were kept
        table = table.append_column("prompt", pa.array([""] * table.num_rows, pa.string()))
    return table.select(["task", "domain", "item", "score", "output", "prompt"])


def _read_samples(folder: Path, record: Record, columns: Sequence[str] | None = None) -> pa.Table | None:
    stores = [RecordStore(folder, kind) for kind in ("records", "baseline")]
    store = next((store for store in stores if store.exists(record.cell["id"])), stores[0])
    return store.read_table(record.cell["id"], columns, record)


def _measure(measure: Measure, results: Results) -> dict[str, Any]:
    records = results.panel.records()
    group = "scores by domain"
    if measure in results.main:
        group = "scores"
    elif measure.name in {m.name for m in diagnostic_measures(records)}:
        group = "drift, texts and answers"
    label = measure.label
    if group == "scores by domain":
        label = f"{measure.parts[0].task if len(measure.parts) == 1 else 'average'}: {label}"
    section = "scores"
    if measure in CALIBRATION_MEASURES:
        section = "calibration"
    elif measure.name in {m.name for m in consistency_measures(records)}:
        section = "consistency"
    return {
        "name": measure.name,
        "label": label.replace("_", " "),
        "kind": measure.kind,
        "higher": measure.higher_is_better,
        "group": group,
        "section": section,
    }


def _cell(folder: Path, results: Results, row: Row, chosen: Sequence[Mapping[str, str]], alone: bool) -> dict[str, Any]:
    record = row.records[0]
    plan, saliency = _why(folder, record, alone)
    stages = list(dict.fromkeys(stage for one in row.records for stage in one.timings))
    return {
        "id": record.cell["id"],
        "ids": [one.cell["id"] for one in row.records],
        "seeds": [one.cell.get("seed") for one in row.records],
        "method": row.label,
        "look": row.method.removesuffix(f" {record.cell.get('quantize')}"),
        "ratio": row.ratio,
        "corpus": "" if row.calibration == NO_CORPUS else row.calibration,
        "storage": str(record.cell.get("quantize") or ""),
        "faults": [fault for one in row.records for fault in faults(one)],
        "notes": _notes(results, row),
        "scores": {
            measure.name: _shown(measure, result.estimate, result.difference)
            for measure in results.measures
            if (result := results.get(row, measure)) is not None
        },
        "megabytes": _number(weights_megabytes(row)),
        "removed": _number(parameters_removed(row)),
        "reduction": _number(memory_reduction(row)),
        "sizes": {name: value for name, value in record.sizes.items() if isinstance(value, int | float | str)},
        "timings": {stage: _mean(r.timings[stage] for r in row.records if stage in r.timings) for stage in stages},
        "settings": record.config.get("method", {}) if row is not results.panel.baseline else {},
        "versions": record.versions | {f"engine {key}": str(value) for key, value in record.engine.items()},
        "contamination": record.contamination,
        "plan": record.plan,
        "map": plan,
        "saliency": saliency,
        "curves": {metric: _points(row, metric, kind) for metric, kind, _ in PANELS},
        "reliability": [[*map(_number, ends), n] for *ends, n in reliability(record)],
        "layers": [
            {name: _rounded(value) for name, value in numbers.items()} for numbers in layer_numbers(folder, row)
        ],
        "texts": _texts(folder, record, chosen),
    }


def _notes(results: Results, row: Row) -> list[str]:
    """What was not measured, and that there is no baseline, or where it was evaluated."""
    told = [f"not measured: {what}" for what in unmeasured([row])]
    return [*told, *filter(None, [absent(results.panel), elsewhere(results.panel)])]


def _published(all_results: Sequence[Results]) -> dict[str, Any] | None:
    tables = [table for results in all_results if (table := published_table(results)) is not None]
    if not tables:
        return None
    rows = [row for table in tables for row in table.rows]
    return {"header": tables[0].header, "rows": rows, "note": max((table.note for table in tables), key=len)}


def _shown(measure: Measure, value: Estimate, difference: Estimate | None) -> list[Any]:
    """[text, value, low, high, n, text of the difference or None, difference, whether it is paired]."""
    numbers = [_number(value.value), _number(value.low), _number(value.high), value.n]
    if difference is None:
        return [format_estimate(measure.kind, value), *numbers, None, None, False]
    text = format_estimate(measure.kind, difference, signed=True)
    return [format_estimate(measure.kind, value), *numbers, text, _number(difference.value), difference.paired]


def _points(row: Row, metric: str, kind: str) -> list[list[float | None]]:
    """[last position, value, low, high] of each stretch of positions."""
    return [[at, _number(one.value), _number(one.low), _number(one.high)] for at, one in curve(row, metric, kind)]


def _why(folder: Path, record: Record, alone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """layer -> where each old expert went (its new expert, -1 if removed), and layer -> saliency of each old expert;
    empty where the files of the cell are not kept. ``alone``: the folder may be that of a single cell.
    """
    places = [folder / "cells" / record.cell["id"], *([folder] if alone else [])]
    place = next((place for place in places if (place / "plan.json").is_file()), None)
    if not record.plan or place is None or (place / "plan.json").stat().st_size > LARGEST_PLAN:
        return {}, {}
    try:
        return _routes(place / "plan.json"), _saliency(place / "saliency.json")
    except WinnowError:  # told by ``damaged_plans``
        return {}, {}


def damaged_plans(folder: Path, panels: Sequence[Panel]) -> list[str]:
    """A line for each plan and saliency of a cell that cannot be read: the page shows no map of such a cell."""
    places = [folder / "cells" / record.cell["id"] for panel in panels for record in panel.records()]
    told = []
    for place in [*places, folder]:  # which may be that of a single cell
        for read, path in ((_routes, place / "plan.json"), (_saliency, place / "saliency.json")):
            if path.is_file() and path.stat().st_size > LARGEST_PLAN:
                continue
            try:
                read(path)
            except WinnowError as error:
                told.append(str(error))
    return told


def _routes(path: Path) -> dict[str, list[int]]:
    """layer -> of each old expert the stored one that it became, in their order; below 0 where it is none of these:
    ``REMOVED``, or replaced by a ``CONSTANT`` or a low-rank ``MAP``. Nothing where there is no such file.

    Raises WinnowError where it is damaged.
    """

    def read(plan: Any) -> dict[str, list[int]]:
        return {str(layer["layer"]): _route(layer) for layer in plan["layers"]}

    return _read(path, read)


def _route(layer: Any) -> list[int]:
    stored: list[int] = []
    count = 0
    for new in layer["experts"]:
        if new.get("constant") or new.get("low_rank"):
            stored.append(CONSTANT if new.get("constant") else MAP)
        else:
            stored.append(count)
            count += 1
    return [REMOVED if new is None else stored[_typed(new, int)] for new in layer["route"]]


def _saliency(path: Path) -> dict[str, list[float | None]]:
    """layer -> the saliency of each old expert; nothing where there is none. Raises WinnowError where it is damaged."""

    def read(why: Any) -> dict[str, list[float | None]]:
        layers = why.get("layers", {})
        return {layer: [_number(_typed(value, int, float)) for value in values] for layer, values in layers.items()}

    return _read(path, read)


def _typed(value: Any, *kinds: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{value!r} is no number")
    return value


def _read(path: Path, read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    if not (path.exists() or path.is_symlink()):
        return {}
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WinnowError(f"{path} is damaged: delete it; the page has no map of its cell") from error


def _texts(folder: Path, record: Record, chosen: Sequence[Mapping[str, str]]) -> list[list[Any] | None]:
    """[text, score, whether it was cut] of each chosen item; None where it is not kept."""
    table = samples_table(folder, record) if chosen else None
    if table is None:
        return []
    table = table.filter(pc.is_in(table["item"], pa.array({one["item"] for one in chosen}, pa.string())))
    written = {(one["task"], one["domain"], one["item"]): one for one in table.to_pylist()}
    if not any(one["output"] for one in written.values()):
        return []
    found = (written.get((one["task"], one["domain"], one["item"])) for one in chosen)
    return [
        None
        if one is None
        else [_cut(one["output"], TEXT_LENGTH), _number(one["score"]), len(one["output"]) > TEXT_LENGTH]
        for one in found
    ]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return _number(value) if isinstance(value, float) else value


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return _number(sum(kept) / len(kept)) if kept else None


def _number(value: float | None) -> float | None:
    """Five digits are more than a page shows; JSON has neither NaN nor infinity."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
