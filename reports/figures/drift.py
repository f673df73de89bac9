"""The figure of drift by position: where along a text a compressed model leaves the uncompressed one."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures.palette import looks
from reports.figures.scores import _STYLE
from reports.numbers.load import Row
from reports.numbers.measures import Results
from reports.numbers.probes import DRIFT
from reports.numbers.statistics import Estimate, Measure, Part, estimate

WIDTH = 6.9  # inches: three panels across, for a figure over two columns
PANELS = (
    ("js", "number", "JS divergence (nats)"),
    ("free_js", "number", "the same, free-running"),
    ("running_cross_perplexity", "perplexity", "running cross-perplexity"),
)
NOTE = (
    "Drift by position: divergences are means over a stretch of positions, drawn at its last one, of the texts that "
    "reach it; the running cross-perplexity is that of all tokens of the row's own texts up to the position under the "
    "uncompressed model. Bars are 95 % intervals from a bootstrap over texts; samples as in the table of drift."
)


def drift_by_position(results: Results, corpus: str) -> Figure | None:
    """A row of panels a ratio, a line a method with its intervals, positions on a logarithmic axis.

    ``NOTE`` says what stands where; the grey line is the uncompressed model. None where no row has drift.
    """
    rows = [row for row in results.panel.of_corpus(corpus) if curve(row, "js", "number")]
    if not rows:
        return None
    ratios, methods = sorted({row.ratio for row in rows}), sorted({row.method for row in rows})
    of_methods = {
        name: {"color": colour, "marker": marker, "linewidth": 1.1} for name, (colour, marker) in looks(methods).items()
    }
    baseline = results.panel.baseline
    with matplotlib.rc_context(_STYLE):
        legend_rows = 1 + len(methods) // 4
        figure = Figure(figsize=(WIDTH, 0.5 + 1.8 * len(ratios) + 0.17 * legend_rows), layout="constrained")
        grid = figure.subplots(len(ratios), len(PANELS), squeeze=False, sharex=True)
        for across, (metric, kind, title) in enumerate(PANELS):
            for axes, ratio in zip(grid[:, across], ratios, strict=True):
                if baseline is not None:
                    _draw(axes, curve(baseline, metric, kind), "baseline", {"color": "#777777", "linewidth": 1.2})
                for row in (row for row in rows if row.ratio == ratio):
                    _draw(axes, curve(row, metric, kind), row.method, of_methods[row.method])
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.set_ylim(bottom=0 if kind == "number" else 1)  # what no drift would be
            grid[0, across].set_title(title)
        for axes, ratio in zip(grid[:, 0], ratios, strict=True):
            axes.set_ylabel(f"ratio {ratio:g}")
        grid[-1, 1].set_xlabel("position in the text (tokens)")
        labelled: dict[str, Any] = {}
        for axes in grid.flat:
            handles, labels = axes.get_legend_handles_labels()
            labelled = dict(zip(labels, handles, strict=True)) | labelled
        figure.legend(
            [*labelled.values()], [*labelled], loc="outside lower center", ncols=4, frameon=False, handlelength=2.4
        )
    return figure


def curve(row: Row, metric: str, kind: str) -> list[tuple[int, Estimate]]:
    """(last position of a stretch, the measure there) of each stretch that all cells of the row have a score for."""
    stretches = {s.part for r in row.records for s in r.scores if (s.task, s.metric) == (DRIFT, metric)}
    points = []
    for stretch in stretches:
        if stretch.startswith("position "):
            found = estimate(Measure(metric, metric, (Part(DRIFT, metric, stretch),), kind), row.records)
            if found is not None and np.isfinite(found.value):
                points.append((int(stretch.rpartition("-")[2]), found))
    return sorted(points, key=lambda point: point[0])


def _draw(axes: Axes, points: Sequence[tuple[int, Estimate]], label: str, look: dict[str, Any]) -> None:
    if not points:
        return
    value, low, high = (np.array([getattr(one, name) for _, one in points]) for name in ("value", "low", "high"))
    axes.errorbar(
        [place for place, _ in points],
        value,
        yerr=np.maximum(0, [value - low, high - value]),
        label=label,
        **{"markersize": 3.5, "elinewidth": 0.7} | look,
    )
