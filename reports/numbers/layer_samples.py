"""The samples behind the numbers of layer diagnostics, so that claims about them can be tested on few layers.

Every verdict is about the model at hand, whose layers are not a sample of anything: a number that each layer has is
averaged over them, and its uncertainty comes from what was sampled.

- Errors and spreads are sums over calibration tokens. Their samples are the ten parts that the documents were dealt
  into at random (``harness.layers.theory.folds_of``), each with its pseudo-value, value + (F - 1) (mean of the values
  without one part - value without this part): the mean of these is the value, and their squared standard error is that
  of the jackknife (Tukey 1958). Cells that were given the same tokens pair part by part; all layers share the tokens,
  so a part is averaged over layers first.
- Distances between the weights of merged experts are exact; what is sampled is the groups that come to be merged. The
  samples are groups, each with the mean over its pairs, layer by layer: pairs of one group share an expert. The pairs
  of experts drawn at random from the same layer, which they are set beside, are samples of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reports.numbers import probes
from reports.numbers.diagnosed import read_diagnostics
from reports.numbers.load import Panel, Row
from reports.numbers.statistics import Items, Part

PARTS, GROUPS, LAYERS = "parts of the calibration tokens", "groups of merged experts", "layers"
# Why there cannot be more of them.
NO_MORE = {
    GROUPS: "the plan has no more groups",
    LAYERS: "the model has no more layers (without its file in diagnostics/ a cell that is run again with "
    "diagnostics=layers gets one that holds the samples behind them)",
}
_OF_PAIRS = ("distance", "aligned_distance", "overlap")
RANDOM_PAIRS = "average_"  # before the name of what was measured on pairs drawn at random

Samples = tuple[str, str, str, float]  # task, domain, item, score


def with_layer_samples(folder: Path, panel: Panel) -> Panel:
    """The panel with these samples beside those of the tasks, for the cells that have diagnostics.

    Raises WinnowError where a file of them is damaged.
    """
    rows = tuple(_with_samples(folder, row) for row in panel.rows)
    return replace(panel, rows=rows)


def samples_of_each(part: Part, items: Items | None) -> Items | None:
    """The samples of a score that is given for each layer; None where there are none."""
    own = None if items is None else items.select(Part(_task(part.metric), part.metric))
    return own if own is not None and len(own.score) else None


def unit_of(part: Part, rows: Sequence[Row]) -> str:
    """What the items of a score that is given for each layer are, in a comparison of the rows."""
    known = [samples_of_each(part, items) for row in rows for items in row.items]
    if not known or any(items is None for items in known):
        return LAYERS
    return GROUPS if part.metric.removeprefix(RANDOM_PAIRS) in _OF_PAIRS else PARTS


def of_layers(part: Part, row: Row) -> dict[str, float]:
    """Layer -> its score, the mean over seeds."""
    scores: dict[str, list[float]] = {}
    for score in (score for record in row.records for score in record.scores):
        if (score.task, score.metric) == (part.task, part.metric) and score.part:
            scores.setdefault(score.part, []).append(score.value)
    return {layer: sum(values) / len(values) for layer, values in scores.items()}


def _task(metric: str) -> str:
    return f"{probes.LAYERS}/{metric}"


def _with_samples(folder: Path, row: Row) -> Row:
    found = [read_diagnostics(folder, record.cell["id"]) for record in row.records]
    items = [
        own if diagnosed is None else _joined(own, [*_of_parts(diagnosed), *_of_groups(diagnosed["layers"])])
        for own, diagnosed in zip(row.items, found, strict=True)
    ]
    return replace(row, items=tuple(items))


def _joined(items: Items | None, samples: Sequence[Samples]) -> Items | None:
    if not samples:
        return items
    columns = dict(zip(("task", "domain", "item", "score"), zip(*samples, strict=True), strict=True))
    own = Items.from_columns({**columns, "weight": [1.0] * len(samples)})
    return own if items is None else items.joined(own)


def _of_parts(diagnosed: Mapping[str, Any]) -> Iterator[Samples]:
    layers = list(diagnosed["layers"].values())
    for metric in layers[0].get("left_out", {}) if layers else ():
        values = [pseudo_values(layer[metric][0], layer.get("left_out", {}).get(metric, ())) for layer in layers]
        # A layer that the theory says nothing of has no prediction.
        if len({len(own) for own in values}) == 1:
            for number, score in enumerate(np.mean(values, axis=0)):
                yield _task(metric), "", f"{diagnosed['sample']} part {number}", float(score)


def pseudo_values(value: float, left_out: Sequence[float]) -> np.ndarray:
    """(F,) from the values without one part each: their mean is ``value``, their standard error the jackknife's."""
    without = np.asarray(left_out, dtype=np.float64)
    return value + (len(without) - 1) * (without.mean() - without) if len(without) else without


def _of_groups(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[Samples]:
    for layer, numbers in layers.items():
        groups = np.array([pair[0] for pair in numbers.get("pairs", ())])
        for metric in _OF_PAIRS if len(groups) else ():
            for group in np.unique(groups):
                yield _task(metric), layer, f"group {group}", float(np.mean(np.array(numbers[metric])[groups == group]))
            for place, value in enumerate(numbers.get(f"{RANDOM_PAIRS}{metric}", ())):
                yield _task(f"{RANDOM_PAIRS}{metric}"), layer, f"pair {place}", float(value)
