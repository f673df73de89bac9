"""What the calibration corpus does: what a plan calibrated on one costs on each domain, and which experts it keeps."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from reports.figures.scores import _STYLE, by_domain
from reports.numbers.kept import Kept, jaccard
from reports.numbers.load import NO_CORPUS, Row
from reports.numbers.measures import Results
from reports.numbers.statistics import Measure

WIDTH = 6.9  # inches: a figure over two columns
_MOST_LAYERS = 4  # that have a square of their own; of more, the mean over all is one square
NOTE = (
    "Left: points that each domain loses against the uncompressed model after calibration on the corpus of the row. "
    "Right: Jaccard's index of the experts kept on two corpora (shared over all that either keeps), layer by layer "
    "(of more than four layers the mean); values and samples as in the tables."
)


def corpus_transfer(results: Results, method: str, kept: Mapping[tuple[float, str], Kept]) -> Figure | None:
    """A row of squares a ratio. ``kept`` is by ratio and corpus; None where fewer than two corpora of a ratio have it,
    or there is no record of the uncompressed model."""
    panel = results.panel
    rows = {
        (row.ratio, row.calibration): row
        for row in panel.rows
        if row.method == method and row.calibration != NO_CORPUS and kept.get((row.ratio, row.calibration))
    }
    shown = {ratio: [corpus for r, corpus in sorted(rows) if r == ratio] for ratio, _ in sorted(rows)}
    shown = {ratio: corpora for ratio, corpora in shown.items() if len(corpora) > 1}
    measures, _ = by_domain(results)
    if not shown or not measures or panel.baseline is None:
        return None
    layers = _squares(kept, shown)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        most = max(len(corpora) for corpora in shown.values())
        figure = Figure(figsize=(WIDTH, 0.9 + len(shown) * (0.45 + 0.22 * most)), layout="constrained")
        grid = figure.subplots(len(shown), 1 + len(layers), squeeze=False)
        for axes_of_ratio, (ratio, corpora) in zip(grid, shown.items(), strict=True):
            own = [rows[ratio, corpus] for corpus in corpora]
            lost = np.array([[_lost(results, panel.baseline, row, measure) for measure in measures] for row in own])
            names = [measure.label.replace("multiple choice", "choice") for measure in measures]
            _draw(axes_of_ratio[0], lost, names, corpora, 0, Normalize(0, 100), "cividis_r")
            axes_of_ratio[0].set_ylabel(f"ratio {ratio:g}")
            for axes, (label, of) in zip(axes_of_ratio[1:], layers.items(), strict=True):
                table = overlaps([kept[ratio, corpus] for corpus in corpora], of)
                _draw(axes, table, corpora, [], 2, Normalize(0, 1), "cividis")
                axes.set_title(label)
            axes_of_ratio[0].set_title("points lost")
        figure.supylabel("calibration corpus", fontsize=9)
    return figure


def overlaps(kept: Sequence[Kept], layers: Sequence[str]) -> np.ndarray:
    """(corpora, corpora): Jaccard's index of the experts kept, the mean over the layers that both have; else NaN."""
    table = np.full((len(kept), len(kept)), np.nan)
    for down, one in enumerate(kept):
        for across, other in enumerate(kept):
            common = [layer for layer in layers if layer in one and layer in other]
            if common:
                table[down, across] = np.mean([jaccard(one[layer][0], other[layer][0]) for layer in common])
    return table


def _squares(kept: Mapping[tuple[float, str], Kept], shown: Mapping[float, Sequence[str]]) -> dict[str, list[str]]:
    """Title -> the layers of each square."""
    cells = [kept[ratio, corpus] for ratio, corpora in shown.items() for corpus in corpora]
    layers = sorted({layer for of in cells for layer in of}, key=int)
    if len(layers) > _MOST_LAYERS:
        return {f"kept in both, {len(layers)} layers": layers}
    return {f"kept in both, layer {layer}": [layer] for layer in layers}


def _lost(results: Results, baseline: Row, row: Row, measure: Measure) -> float:
    before, after = results.get(baseline, measure), results.get(row, measure)
    return np.nan if before is None or after is None else 100 * (before.estimate.value - after.estimate.value)


def _draw(
    axes: Axes,
    table: np.ndarray,
    across: Sequence[str],
    down: Sequence[str],
    digits: int,
    norm: Normalize,
    colours: str,
) -> None:
    colour_map = matplotlib.colormaps[colours]
    axes.imshow(table, aspect="auto", cmap=colour_map, norm=norm)
    for (y, x), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        red, green, blue, _ = colour_map(norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        colour = "white" if dark else "black"
        text = f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no minus before a zero
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(across)), across, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(down)), down)
