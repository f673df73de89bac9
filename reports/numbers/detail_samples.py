"""Item by item, scores whose items are told in the detail of a task's samples, so that cells pair on them.

- Drift at a stretch of positions is the mean over texts of a text's mean there: the items are the texts that reach it.
- The curve of drift over positions as a whole, text by text: its area (the mean over the text's positions) and its
  slope (least squares, per ten positions; of texts of at least eight, since of two positions it would say nothing).
- Expected calibration error, the mean over questions of their bin's |gap|, is also the mean of ``sign of the bin's gap
  x (confidence - outcome)``: the items are these (Guo et al. 2017, equation 3). The signs are held, as the delta method
  holds them; where a bin's gap is near 0 that makes the error of a difference a little too small.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.contracts.record import Record
from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.numbers.load import Panel, Row
from reports.numbers.probes import CALIBRATION_ERROR, DRIFT
from reports.numbers.statistics import Items, Part

AREA, SLOPE = "js_area", "js_slope"  # metrics of the curve
LEAST_POSITIONS = 8
BINS = 15  # as of tasks.probes.confidence
Sample = tuple[str, str, str, float]  # task, domain, item, score
_COLUMNS = ("task", "domain", "item", "detail")


def with_detail_samples(folder: Path, panel: Panel) -> Panel:
    """The panel with these samples beside those of the tasks. Raises WinnowError for a damaged file."""
    baseline = None if panel.baseline is None else _with_samples(folder, panel.baseline)
    return replace(panel, baseline=baseline, rows=tuple(_with_samples(folder, row) for row in panel.rows))


def samples_of_score(part: Part, items: Items | None) -> Items | None:
    """The samples of such a score; None where there are none."""
    own = None if items is None else items.select(Part(f"{part.task}/{part.metric}", part.metric, part.of))
    return own if own is not None and len(own.score) else None


def _with_samples(folder: Path, row: Row) -> Row:
    found = zip(row.records, row.items, strict=True)
    return replace(row, items=tuple(items and items.joined(_samples(folder, record)) for record, items in found))


def _samples(folder: Path, record: Record) -> Items | None:
    if not any(score.task in (DRIFT, CALIBRATION_ERROR) for score in record.scores):
        return None
    for kind in ("records", "baseline"):
        table = RecordStore(folder, kind).read_table(record.cell["id"], _COLUMNS)
        if table is not None:
            break
    else:
        return None
    rows = [row for row in table.to_pylist() if row["task"] in (DRIFT, CALIBRATION_ERROR)]
    try:
        told = [(row, dict(json.loads(row["detail"]))) for row in rows]
    except (ValueError, TypeError) as error:
        raise WinnowError(f"the samples of {record.cell['id']} are damaged: a detail is no JSON object") from error
    parts = [score.part for score in record.scores if (score.task, score.metric) == (DRIFT, "js")]
    spans = [part for part in parts if part.startswith("position ")]
    samples = [
        *_of_drift([(row["item"], detail) for row, detail in told if row["task"] == DRIFT], spans),
        *_of_calibration([(row["item"], detail) for row, detail in told if row["task"] == CALIBRATION_ERROR]),
    ]
    columns = dict(zip(("task", "domain", "item", "score"), zip(*samples, strict=True), strict=True)) if samples else {}
    return Items.from_columns({**columns, "weight": [1.0] * len(samples)}) if samples else None


def _of_drift(texts: Sequence[tuple[str, Mapping[str, Any]]], spans: Sequence[str]) -> Iterator[Sample]:
    """``spans`` are named "position 17-32"."""
    for span in spans:
        first, last = map(int, span.removeprefix("position ").split("-"))
        for item, detail in texts:
            if part := detail.get("js", [])[first - 1 : last]:
                yield f"{DRIFT}/js", span, item, float(np.mean(part))
    for item, detail in texts:
        curve = np.array(detail.get("js", ()), dtype=np.float64)
        if len(curve):
            yield f"{DRIFT}/{AREA}", "", item, float(curve.mean())
        if len(curve) >= LEAST_POSITIONS:
            yield f"{DRIFT}/{SLOPE}", "", item, 10 * float(np.polyfit(np.arange(len(curve)), curve, 1)[0])


def _of_calibration(questions: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Sample]:
    known = [(item, detail["confidence"], detail["right"]) for item, detail in questions if "confidence" in detail]
    if known:
        sure, right = (np.array([one[place] for one in known], dtype=np.float64) for place in (1, 2))
        places = np.clip(np.ceil(sure * BINS) - 1, 0, BINS - 1).astype(np.intp)
        signs = np.sign(np.bincount(places, weights=sure - right, minlength=BINS))
        for (item, *_), score in zip(known, signs[places] * (sure - right), strict=True):
            yield f"{CALIBRATION_ERROR}/ece", "", item, float(score)
