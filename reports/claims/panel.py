"""The models that conclusions stand on: the panel with its bars, and those that were tried before the shipped one."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from reports.numbers.load import Panel
from reports.numbers.measures import averages, reference_columns
from reports.numbers.statistics import Measure, find_score
from reports.tables.formats import MISSING, Table, format_number, format_value

SHIPPED, PANEL = "reference", "panel_"  # the names of the shipped model, and how those of the panel begin
# What an uncompressed model must reach, decided before any of the panel was trained; those that miss one are reported
# with the others.
BARS = {"code": 0.7, "math": 0.7, "writing": 0.9, "multiple choice": 0.75}
_BARS_NOTE = (
    "The uncompressed models, in percent with 95 % intervals. All were made by one recipe, with one thing changed "
    "each, decided beforehand; bars on skill alone: code and math 70, elements of a story 90, multiple choice 75. A "
    "model that misses one stays in all tables and verdicts."
)
_TRIED_NOTE = (
    "Generative average in percent, calibrated on mixed, 100 items a domain (A: 60 for REAP and frequency). Choosing a "
    "model is a choice too: these were trained before the shipped one, and not all methods were scored on each "
    "(results/reference_model/NOTES.md)."
)


def bars_table(panels: Sequence[Panel]) -> Table | None:
    """None where fewer than two of the models have a record of the uncompressed model."""
    own = {p.model: p for p in panels if p.baseline is not None and (p.model == SHIPPED or p.model.startswith(PANEL))}
    if len(own) < 2:
        return None
    body = []
    for model, panel in own.items():
        cells, missed = [], []
        for name, bar in BARS.items():
            value, text = _of_baseline(panel, name)
            cells.append(text)
            missed += [name] if value is None or value < bar else []
        body.append([model, *cells, f"missed: {', '.join(missed)}" if missed else "met"])
    return Table("Models of the panel", ["model", *BARS, "bars"], body, _BARS_NOTE)


def _of_baseline(panel: Panel, name: str) -> tuple[float | None, str]:
    """The score of a domain, or of multiple choice, and as text; (None, a dash) where it was not measured."""
    record = panel.baseline_record()
    assert record is not None
    stand = averages(reference_columns(panel.records(), record))
    measure: Measure | None = stand.choice if name == "multiple choice" else stand.domains.get(name)
    score = None if measure is None or len(measure.parts) > 1 else find_score(record, measure.parts[0])
    if score is None:
        return None, MISSING
    value, low, high = (format_value("share", number) for number in (score.value, score.low, score.high))
    return score.value, f"{value} [{low}, {high}]"


def has_shipped(panels: Sequence[Panel]) -> bool:
    """Whether the shipped model is among those of the panels, so that the others that were tried belong beside it."""
    return any(panel.model == SHIPPED for panel in panels)


@cache
def tried() -> list[dict[str, Any]]:
    """The models of results/reference_model/NOTES.md, in the order in which they were trained."""
    return json.loads(Path(__file__).with_name("tried.json").read_text(encoding="utf-8"))


def tried_table() -> Table:
    """Which method was best on each of the models that were tried, at a quarter and at half."""
    header = ["model", "layers", "baseline", "25 %: best", "random", "50 %: best", "REAP", "random"]
    body = []
    for one in tried():
        quarter, half = (one["scores"].get(ratio, {}) for ratio in ("0.25", "0.5"))
        body.append(
            [one["model"], one["layers"], _score(one["baseline"]), _best(quarter), _score(quarter.get("random")),
             _best(half), _score(half.get("reap")), _score(half.get("random"))]
        )  # fmt: skip
    return Table("Models tried before the shipped one", header, body, _TRIED_NOTE)


def _best(scores: Mapping[str, float]) -> str:
    if not scores:
        return MISSING
    best = max(scores, key=lambda name: scores[name])
    return f"{best} {_score(scores[best])}"


def _score(value: float | None) -> str:
    return MISSING if value is None else format_number(value, 1)
