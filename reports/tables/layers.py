"""Layer diagnostics: what each plan did to the layers by themselves, against theory; from ``diagnostics/CELL.json``."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from harness.errors import WinnowError
from reports.figures.palette import looks
from reports.figures.scores import _LINES, _STYLE
from reports.numbers.diagnosed import read_diagnostics
from reports.numbers.kept import Kept, jaccard, jaccard_by_chance, kept_experts
from reports.numbers.load import NO_CORPUS, Panel, Row
from reports.numbers.paired import rank_correlation
from reports.tables.formats import MISSING, Table, format_number, format_span

WIDTH = 6.9  # inches: a figure over two columns
Layers = Mapping[str, Mapping[str, Any]]  # layer -> its numbers

_NOTE = (
    "Each layer of the compressed model is given what that of the original is given, of {tokens} calibration tokens; "
    "the mean over MoE layers (n: {n}) and the lowest and highest layer; of several seeds, the first. Errors are those "
    "of the routed experts' output, E|y − ŷ|² over E|y|²; the predicted one is the least that merging can cost "
    "(REAP, equation 6, for groups of any size) plus what removed experts added, and ρ its rank correlation with the "
    "measured one over layers, 95 % interval in brackets. Spread is the mean squared distance of expert outputs from "
    "their centre, the compressed layer's over the original's (below 1 they draw together), and PC the share of it in "
    "the first two principal components. Distance is between the weights of merged experts with their channels "
    "aligned, over their norm (1.41 for unrelated ones), and in parentheses that of average pairs; overlap likewise is "
    "the mean squared cosine between their 8 leading singular vectors. Load entropy (nats) is that of the tokens on "
    "the stored experts. Intervals layer by layer are in diagnostics/."
)
_OVERLAP_NOTE = (
    "Shared experts over all experts that either of two corpora keeps (Jaccard), the mean over layers (n: {n}) and the "
    "lowest and highest layer; by chance is what two random choices of as many would share."
)
_ON_PAGE = {
    "measured": "measured_error",
    "predicted": "predicted_error",
    "ratio": "spread_ratio",
    "distance": "aligned_distance",
    "average": "average_aligned_distance",
}
FIGURE_NOTE = (
    "Left: the measured error of every layer over the predicted one, both over the output's energy; on the line they "
    "are equal, and ρ is the rank correlation over all layers shown. Right: spread of expert outputs, of the original, "
    "layer by layer."
)


def layers_of(folder: Path, row: Row) -> Layers | None:
    """The diagnostics of the row's first cell that has any."""
    found = (read_diagnostics(folder, record.cell["id"]) for record in row.records)
    return next((one["layers"] for one in found if one is not None), None)


def layer_numbers(folder: Path, row: Row) -> list[dict[str, Any]]:
    """What the page shows of each MoE layer of the row's first cell that has diagnostics; empty where none has.

    ``layer``, ``tokens``, ``measured``, ``predicted``, ``ratio`` (of the spreads), ``distance`` and ``average``
    (aligned; of merged and of average pairs), each [value, low, high, n] or None where it does not apply, and
    ``spread`` and ``entropy``, [before, after].
    """
    for record in row.records:
        found = read_diagnostics(folder, record.cell["id"])
        if found is None:
            continue
        scores = {(s.metric, s.part): [s.value, s.low, s.high, s.n] for s in found["scores"]}
        return [
            {"layer": layer, "tokens": found["tokens"]}
            | {name: scores.get((metric, layer)) for name, metric in _ON_PAGE.items()}
            | {
                name: [numbers[f"{key}_before"], numbers[f"{key}_after"]]
                for name, key in (("spread", "spread"), ("entropy", "load_entropy"))
            }
            for layer, numbers in found["layers"].items()
        ]
    return []


def layer_table(folder: Path, panel: Panel, corpus: str) -> Table | None:
    """None where no cell of the corpus has diagnostics."""
    diagnosed = _diagnosed(folder, panel.of_corpus(corpus))
    if not diagnosed:
        return None
    header = [
        "ratio", "method", "measured error (%)", "predicted error (%)", "ρ", "spread", "PC 1+2 (%)", "distance",
        "overlap", "groups of one (%)", "largest group", "load entropy",
    ]  # fmt: skip
    rows = [[f"{row.ratio:g}", row.label, *_cells(list(layers.values()))] for row, layers in diagnosed]
    tokens = {
        found["tokens"]
        for row, _ in diagnosed
        for record in row.records
        if (found := read_diagnostics(folder, record.cell["id"])) is not None
    }
    counts = {len(layers) for _, layers in diagnosed}
    note = _NOTE.format(tokens=format_span(tokens), n=format_span(counts))
    return Table("Layer by layer", header, rows, note)


def kept_of(folder: Path, row: Row) -> Kept:
    """The experts that the row's first cell keeps; empty where that is not known (a damaged plan is told elsewhere)."""
    try:
        return kept_experts(folder, row.records[0].cell["id"])
    except WinnowError:
        return {}


def overlap_table(folder: Path, panel: Panel) -> Table | None:
    """Overlap of the experts that a method keeps on two corpora; None where nothing can be compared."""
    kept: dict[tuple[float, str], dict[str, Kept]] = defaultdict(dict)
    for row in panel.rows:
        if found := kept_of(folder, row):
            kept[row.ratio, row.method][row.calibration] = found
    rows, counts = [], set()
    for (ratio, method), of_corpora in sorted(kept.items()):
        for one, other in combinations(sorted(set(of_corpora) - {NO_CORPUS}), 2):
            common = [layer for layer in of_corpora[one] if layer in of_corpora[other]]
            pairs = [(of_corpora[one][layer], of_corpora[other][layer]) for layer in common]
            if not pairs:
                continue
            shared = [jaccard(first, second) for (first, _), (second, _) in pairs]
            chance = np.mean([jaccard_by_chance(len(a), len(b), experts) for (a, experts), (b, _) in pairs])
            rows.append([f"{ratio:g}", method, f"{one}, {other}", _span(shared, 2), format_number(float(chance), 2)])
            counts.add(len(pairs))
    if not rows:
        return None
    note = _OVERLAP_NOTE.format(n=format_span(counts))
    return Table("Experts kept on two corpora", ["ratio", "method", "corpora", "overlap", "by chance"], rows, note)


def layer_figure(folder: Path, panel: Panel, corpus: str) -> Figure | None:
    """Predicted against measured error, and the spread by layer. None where no cell of the corpus has diagnostics."""
    diagnosed = _diagnosed(folder, panel.of_corpus(corpus))
    if not diagnosed:
        return None
    ratios = sorted({row.ratio for row, _ in diagnosed})
    look = looks(sorted({row.method for row, _ in diagnosed}))
    with matplotlib.rc_context(_STYLE):
        legend_rows = 1 + len(diagnosed) // 4
        figure = Figure(figsize=(WIDTH, 2.5 + 0.17 * legend_rows), layout="constrained")
        errors, spreads = figure.subplots(1, 2)
        points: list[tuple[float, float]] = []
        for row, layers in diagnosed:
            colour, marker = look[row.method]
            line = _LINES[ratios.index(row.ratio) % len(_LINES)]
            fill = colour if row.ratio == ratios[-1] else "none"
            of_row = errors_of(list(layers.values()))
            points += of_row
            style = {"color": colour, "marker": marker, "markersize": 4, "markerfacecolor": fill}
            if of_row:
                errors.plot(*zip(*of_row, strict=True), linestyle="none", **style)
            spreads.plot(
                [int(layer) for layer in layers],
                [numbers["spread_ratio"][0] for numbers in layers.values()],
                linestyle=line,
                linewidth=1.1,
                label=f"{row.method} {row.ratio:g}",
                **style,
            )
        positive = [value for point in points for value in point if value > 0]
        if positive:
            ends = [0.8 * min(positive), 1.25 * max(positive)]
            errors.plot(ends, ends, color="#777777", linewidth=0.8)
            errors.set_xscale("log")
            errors.set_yscale("log")
        rho = _rho(points)
        errors.set_title("" if rho is None else f"ρ = {format_number(rho[0], 2)} over {len(points)} layers")
        errors.set_xlabel("predicted error")
        errors.set_ylabel("measured error")
        spreads.set_xlabel("layer")
        spreads.set_ylabel("spread, of the original")
        spreads.set_ylim(bottom=0)
        spreads.xaxis.get_major_locator().set_params(integer=True)
        handles, labels = spreads.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, handlelength=2.4)
    return figure


def _diagnosed(folder: Path, rows: Sequence[Row]) -> list[tuple[Row, Layers]]:
    found = [(row, layers_of(folder, row)) for row in rows]
    return [(row, layers) for row, layers in found if layers]


def errors_of(layers: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(predicted, measured) of the layers that the theory says anything of."""
    return [(one["predicted_error"][0], one["measured_error"][0]) for one in layers if "predicted_error" in one]


def _cells(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    points = errors_of(layers)
    rho = _rho(points)
    return [
        _span([one["measured_error"][0] for one in layers], 1, 100),
        _span([predicted for predicted, _ in points], 1, 100),
        MISSING if rho is None else "{} [{}, {}]".format(*(format_number(value, 2) for value in rho)),
        _span([one["spread_ratio"][0] for one in layers], 2),
        _change([(sum(one[f"explained_{when}"][:2]) for when in ("before", "after")) for one in layers], 0, 100),
        _beside_average(layers, "aligned_distance"),
        _beside_average(layers, "overlap"),
        _span([one["singleton_share"] for one in layers], 0, 100),
        format_span({one["largest_group"] for one in layers}),
        _change([(one["load_entropy_before"], one["load_entropy_after"]) for one in layers], 2),
    ]


def _rho(points: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    if len(points) < 4:
        return None
    found = rank_correlation([x for x, _ in points], [y for _, y in points])
    return found.effect, found.low, found.high


def _span(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    if not values:
        return MISSING
    three = (float(np.mean(values)), min(values), max(values))
    return "{} [{}, {}]".format(*(format_number(value, digits, factor) for value in three))


def _change(pairs: Sequence[Any], digits: int, factor: float = 1.0) -> str:
    """The mean before and after."""
    before, after = np.mean([list(pair) for pair in pairs], axis=0)
    return f"{format_number(before, digits, factor)} → {format_number(after, digits, factor)}"


def _beside_average(layers: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean over layers, and in parentheses that of average pairs; layers without groups do not count."""
    grouped = [one for one in layers if one.get(name)]
    if not grouped:
        return MISSING
    own, average = (float(np.mean([np.mean(one[f"{prefix}{name}"]) for one in grouped])) for prefix in ("", "average_"))
    return f"{format_number(own, 2)} ({format_number(average, 2)})"
