"""Published figures beside the measured ones, for the methods, ratios and models that have both a source and a cell."""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from reports.numbers.load import NO_CORPUS, Row
from reports.numbers.measures import Results
from reports.tables.formats import MISSING, Table, format_estimate, format_number

_BYTES = {"gb": 1e-9, "gib": 2.0**-30}
_NOTE = (
    "What others published, beside this sweep's cells of the same method and ratio and, where the figure is of one "
    "model, the same model. Prompts, samples, calibration and harness are theirs and differ from ours; a mean over a "
    "paper's models is shown beside any model, as the size of effect to expect. 95 % intervals and samples of the "
    "measured ones as in the tables of scores. Sources: "
)


def load_published() -> dict[str, Any]:
    """``sources``: short name -> source; ``rows``: source, model (None: a mean over models), method, ratio, bits of the
    weights (absent: not quantised), what, value (a number, or words) and, where this project measures it, ``beside``.
    """
    return json.loads(files("reports").joinpath("published.json").read_text(encoding="utf-8"))


def published_table(results: Results, published: Mapping[str, Any] | None = None) -> Table | None:
    """None where nothing that was published is of a cell of the panel."""
    published = load_published() if published is None else published
    body, used = [], []
    for figure in published["rows"]:
        for row in (row for row in results.panel.all_rows() if _same_setting(figure, row)):
            value = figure["value"]
            text = value if isinstance(value, str) else f"{value:g}".replace("-", "−")
            corpus = MISSING if row.calibration == NO_CORPUS else row.calibration
            measured = _measured(results, row, figure.get("beside", {}))
            names = [f"{row.ratio:g}", row.label, corpus, figure["what"]]
            body.append([*names, figure["model"] or "several", text, measured, figure["source"]])
            used.append(figure["source"])
    if not body:
        return None
    body.sort(key=lambda cells: (float(cells[0]), cells[1], cells[3]))
    sources = "; ".join(f"{name}: {published['sources'][name]}" for name in dict.fromkeys(used))
    header = ["ratio", "method", "corpus here", "figure", "published for", "published", "measured here", "source"]
    return Table("Measured beside published", header, body, f"{_NOTE}{sources}.")


def _same_setting(figure: Mapping[str, Any], row: Row) -> bool:
    record = row.records[0]
    storage = str(record.cell.get("quantize") or "")
    bits = figure.get("bits")
    return (
        figure["ratio"] is not None
        and math.isclose(row.ratio, figure["ratio"])
        and row.method.removesuffix(f" {storage}") == ("baseline" if figure["method"] == "none" else figure["method"])
        and (storage.startswith(f"int{bits}") if bits else not storage)
        and (figure["model"] is None or _model_name(record.config.get("model", {})) == figure["model"].lower())
    )


def _model_name(config: Mapping[str, Any]) -> str:
    """The hub's name in small letters, also of a local copy in a folder ``organisation/name``."""
    return "/".join(PurePath(str(config.get("path", ""))).parts[-2:]).lower()


def _measured(results: Results, row: Row, beside: Mapping[str, str]) -> str:
    kind = beside.get("kind", "")
    if kind in _BYTES:
        return format_number(row.records[0].sizes.get("weights_bytes"), 2, _BYTES[kind])
    wanted = beside.get("task")
    for measure in results.measures:
        if len(measure.parts) == 1 and wanted in (measure.parts[0].task, measure.parts[0].of):
            found = results.get(row, measure)
            one = None if found is None else found.difference if kind == "difference" else found.estimate
            if one is not None:
                return format_estimate(measure.kind, one, signed=kind == "difference")
    return MISSING
