"""The reliability diagram: how often a model is right where it is how sure."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.contracts.record import Record
from reports.figures.palette import looks
from reports.figures.scores import _STYLE
from reports.numbers.load import Row
from reports.numbers.measures import Results
from reports.numbers.probes import CALIBRATION_ERROR

WIDTH = 2.3  # inches a panel
NOTE = (
    "Reliability diagram: share of right answers over mean confidence, a point a bin of confidence that holds "
    "questions, its area by their number; bars are Wilson's 95 % intervals. On the dotted line confidence is right, "
    "below it there is too much of it. Of several seeds the first is drawn; samples as in the table of calibration."
)


def reliability(record: Record) -> list[tuple[float, float, float, float, int]]:
    """(mean confidence, share right, its interval's ends, questions) of each bin, by confidence."""
    scores = {(s.metric, s.part): s for s in record.scores if s.task == CALIBRATION_ERROR}
    points = []
    for (metric, part), share in scores.items():
        confidence = scores.get(("reliability_confidence", part))
        if metric == "reliability" and confidence is not None:
            points.append((confidence.value, share.value, share.low, share.high, share.n))
    return sorted(points)


def reliability_diagram(results: Results, corpus: str) -> Figure | None:
    """A panel a ratio, a line a method; the uncompressed model has a panel of its own. None where no row has it."""
    baseline = results.panel.baseline
    rows = [row for row in results.panel.of_corpus(corpus) if reliability(row.records[0])]
    if not rows:
        return None
    of_methods = looks(row.method for row in rows)
    panels: dict[str, list[Row]] = {}
    if baseline is not None and reliability(baseline.records[0]):
        panels["uncompressed"] = [baseline]
    for row in rows:
        panels.setdefault(f"ratio {row.ratio:g}", []).append(row)
    with matplotlib.rc_context(_STYLE):
        height = 2.5 + 0.17 * (1 + len(of_methods) // 3)
        figure = Figure(figsize=(max(4.6, WIDTH * len(panels)), height), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (title, own) in zip(grid, panels.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="#777777", linewidth=1.0, linestyle=":")
            for row in own:
                colour, marker = of_methods.get(row.method, ("#777777", "o"))
                _draw(axes, reliability(row.records[0]), row.method, {"color": colour, "marker": marker})
            axes.set_title(title)
            axes.set_xlabel("confidence")
            axes.set_xlim(0, 1.05)
            axes.set_ylim(-0.04, 1.06)
        grid[0].set_ylabel("share right")
        labelled: dict[str, Any] = {}
        for axes in grid:
            handles, labels = axes.get_legend_handles_labels()
            labelled = dict(zip(labels, handles, strict=True)) | labelled
        figure.legend([*labelled.values()], [*labelled], loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw(
    axes: Axes, points: Sequence[tuple[float, float, float, float, int]], label: str, look: dict[str, Any]
) -> None:
    confidence, share, low, high, n = np.array(points, dtype=float).T
    bars = np.maximum(0, [share - low, high - share])
    axes.errorbar(confidence, share, yerr=bars, color=look["color"], linewidth=1.0, elinewidth=0.6)
    axes.scatter(confidence, share, s=6 + 60 * n / n.sum(), label=label, zorder=3, **look)
