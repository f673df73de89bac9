"""What Weights & Biases shows of one cell beside its scalars, as plain data: tables, histograms and images."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from harness.contracts.record import Record, Sample
from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.figures.drift import PANELS, drift_by_position
from reports.figures.scores import _STYLE, render
from reports.numbers import probes
from reports.numbers.load import NO_CORPUS, Panel, Row
from reports.numbers.measures import Results
from reports.numbers.usage import collect_usage

GENERATIONS = ("task", "domain", "item", "score", "prompt", "output", "baseline output", "detail")
SCORES = ("task", "part", "kind", "domain", "metric", "value", "low", "high", "n")
PLAN = ("layer", "experts", "router rows", "merged groups", "largest group", "fewest channels", "most channels")
DRIFT = ("metric", "position", "value", "low", "high", "n")
LARGEST_PLAN = 8_000_000  # bytes of a plan.json that is still drawn, some 150,000 experts
MOST_BINS = 512  # of a histogram: the service takes no more


@dataclass(frozen=True)
class CellMedia:
    """``tables``: name -> (columns, rows); ``layers``: layer -> name -> (counts, edges) of a histogram; ``positions``:
    last position of a stretch -> name -> value; ``images``: name -> PNG file.
    """

    tables: dict[str, tuple[tuple[str, ...], list[list[Any]]]]
    layers: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    positions: dict[int, dict[str, float]] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)


def cell_media(
    record: Record, samples: Sequence[Sample], root: Path, folder: Path | None, generations: int
) -> CellMedia:
    """``root`` is the output folder of the sweep, where the baseline is; ``folder`` holds the cell's plan.json and
    saliency.json, where they are kept. ``generations`` is the most texts of a task in the table.

    Raises WinnowError where one of those files is damaged.
    """
    baseline, written = _baseline(record, root)
    plan, saliency = _read(folder, "plan.json"), _read(folder, "saliency.json")
    tables = {
        "generations": (GENERATIONS, generation_rows(samples, written, generations)),
        "scores": (SCORES, score_rows(record)),
        "plan": (PLAN, plan_rows(record)),
        "drift_positions": (DRIFT, drift_rows(record)),
    }
    figures = {
        "expert_map": expert_map(record, plan.get("layers", [])),
        "drift_figure": drift_figure(record, baseline),
    }
    return CellMedia(
        {name: table for name, table in tables.items() if table[1]},
        layer_histograms(record, saliency.get("layers", {})),
        drift_series(record),
        {name: render(figure, "png") for name, figure in figures.items() if figure is not None},
    )


def generation_rows(samples: Sequence[Sample], baseline: Sequence[Sample], most: int) -> list[list[Any]]:
    """The first ``most`` samples of each task that hold a generated text, one row each, beside what the uncompressed
    model wrote for the same item: None where that is not kept.
    """
    beside = {(s.task, s.domain, s.item): s.output for s in baseline}
    texts = sorted((sample for sample in samples if sample.output), key=lambda sample: sample.task)
    return [
        [s.task, s.domain, s.item, _number(s.score), s.prompt, s.output]
        + [beside.get((s.task, s.domain, s.item)), json.dumps(s.detail, default=str)]
        for _, of_task in groupby(texts, key=lambda sample: sample.task)
        for s in list(of_task)[:most]
    ]


def score_rows(record: Record) -> list[list[Any]]:
    return [
        [s.task, s.part, s.kind, s.domain, s.metric, _number(s.value), _number(s.low), _number(s.high), s.n]
        for s in record.scores
        if not s.part.startswith("position ")
    ]


def plan_rows(record: Record) -> list[list[Any]]:
    """One row a layer; without channels where none was cut."""
    return [
        [int(layer), counts["experts"], counts["rows"], len(sizes), max(sizes, default=1), *(_ends(counts))]
        for layer, counts in sorted(record.plan.items(), key=lambda one: int(one[0]))
        for sizes in [counts["group_sizes"]]
    ]


def drift_rows(record: Record) -> list[list[Any]]:
    """Drift by position, a stretch of positions named by its last one."""
    return [
        [s.metric, _last_position(s.part), _number(s.value), _number(s.low), _number(s.high), s.n]
        for s in record.scores
        if s.task == probes.DRIFT and s.part.startswith("position ")
    ]


def drift_series(record: Record) -> dict[int, dict[str, float]]:
    """The values of ``drift_rows`` that the figure draws, as points of lines over the position."""
    drawn = {metric for metric, _, _ in PANELS}
    points: dict[int, dict[str, float]] = {}
    for metric, position, value, *_ in drift_rows(record):
        if metric in drawn and value is not None:
            points.setdefault(position, {})[f"by_position/{metric}"] = value
    return dict(sorted(points.items()))


def layer_histograms(
    record: Record, saliency: Mapping[str, Sequence[float]]
) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Of each layer how many tokens of each source were routed to expert 0, 1, ..., and how many experts have which
    saliency.
    """
    found: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for source, layers in collect_usage([record]).items():
        for layer, counts in layers.items():
            apart = math.ceil(len(counts) / MOST_BINS)
            edges = np.arange(0, len(counts) + apart, apart)
            sums = np.add.reduceat(counts, edges[:-1])
            found.setdefault(int(layer), {})[f"usage/{source}"] = (sums, edges)
    for layer, values in saliency.items():
        finite = np.asarray([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)
        if finite.size:
            found.setdefault(int(layer), {})["saliency"] = np.histogram(finite, bins=min(64, finite.size))
    return dict(sorted(found.items()))


def expert_map(record: Record, layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Where each old expert went, a row a layer: removed, alone, or in a group of so many; where channels were cut, a
    second map of how many of its channels stay. None without the plan.
    """
    if not layers:
        return None
    # What stands for an expert, a constant or a map, has no group; nor has what is removed.
    groups = [
        [_of_new(layer, new, lambda e: len(e["sources"]) or math.nan) for new in layer["route"]] for layer in layers
    ]
    maps = [("experts in the group (grey: removed, or replaced by a constant or a map)", _filled(groups))]
    widths = [record.plan.get(str(layer["layer"]), {}).get("widths") for layer in layers]
    if any(widths):
        kept = [
            [math.nan if new is None or not of_layer else _width(layer, new, of_layer) for new in layer["route"]]
            for layer, of_layer in zip(layers, widths, strict=True)
        ]
        maps.append(("channels that stay (grey: removed)", _filled(kept)))
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(6.9, len(maps) * (0.9 + 0.16 * len(layers))), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(len(maps), 1, squeeze=False).flat, maps, strict=True):
            colours = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd")
            low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (1, 1)
            norm = (
                LogNorm(low, high) if title.startswith("experts") and high > low else Normalize(low, max(high, low + 1))
            )
            drawn = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
            figure.colorbar(drawn, ax=axes, format="%g")
            axes.set(title=title, xlabel="expert", ylabel="layer")
            places = range(0, len(layers), math.ceil(len(layers) / 16))
            axes.set_yticks(list(places), [str(layers[place]["layer"]) for place in places])
    return figure


def _width(layer: Mapping[str, Any], new: int, widths: Sequence[int]) -> float:
    """Of a new expert; ``widths`` are those of the experts that are stored, which have sources."""
    if not layer["experts"][new]["sources"]:
        return math.nan
    return widths[sum(bool(expert["sources"]) for expert in layer["experts"][:new])]


def drift_figure(record: Record, baseline: Record | None) -> Figure | None:
    """``drift_by_position`` of one cell beside the uncompressed model; None where it has no drift."""
    name = " ".join([str(record.cell["method"]), *record.stages()])
    row = Row(name, float(record.cell["ratio"]), NO_CORPUS, (record,), (None,))
    beside = None if baseline is None else Row("baseline", 0.0, NO_CORPUS, (baseline,), (None,))
    return drift_by_position(Results(Panel("", "", "", beside, (row,)), (), {}), NO_CORPUS)


def _baseline(record: Record, root: Path) -> tuple[Record | None, list[Sample]]:
    """The uncompressed model's record and samples; none where they are not kept."""
    store, name = RecordStore(root, "baseline"), record.cell.get("baseline")
    if name is None or not store.exists(name):
        return None, []
    return store.read(name), store.read_samples(name) or []


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    path = None if folder is None else folder / name
    if path is None or not path.is_file() or path.stat().st_size > LARGEST_PLAN:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WinnowError(f"{path} is damaged: delete it, and tracking goes without it") from error


def _ends(counts: Mapping[str, Any]) -> list[int | None]:
    widths = counts.get("widths")
    return [min(widths), max(widths)] if widths else [None, None]


def _last_position(part: str) -> int:
    return int(part.rpartition("-")[2])


def _of_new(layer: Mapping[str, Any], new: int | None, measure: Any) -> float:
    return math.nan if new is None else float(measure(layer["experts"][new]))


def _filled(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """(layers, E), layers with fewer experts filled up with NaN."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
