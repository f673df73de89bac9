"""The figures of a report, drawn without a display and legible at the width of a column (3.4 inches)."""

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reports.figures.palette import looks
from reports.numbers.load import NO_CORPUS, Row
from reports.numbers.measures import (
    CHOICE,
    Results,
    columns_of,
    part_measures,
    weights_megabytes,
)
from reports.numbers.statistics import Measure
from reports.numbers.usage import Usage, layer_names, relative_usage

_LINES = ("-", "--", ":")
_FILLS = ("full", "none", "bottom")  # by how the weights are stored
_UNQUANTISED = "not quantised"
_GREY = "#555555"
_STAR: dict[str, Any] = {"color": _GREY, "marker": "*", "linestyle": "none", "markersize": 8}
_SAME_SIZE = 0.02  # sizes that differ by less, as a share of the uncompressed model's, count as equal
_WIDTH = 4.6  # inches: printed at 3.4, letters of 9 points come out at 6.6
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "winnow",
}


def render(figure: Figure, kind: str) -> bytes:
    """The figure as a file's content (``png`` or ``pdf``), the same bytes for the same numbers."""
    buffer = io.BytesIO()
    stamp = {"CreationDate": None} if kind == "pdf" else {}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=200, metadata=stamp)
    figure.set_layout_engine("none")  # the next format takes this layout, which takes as long as all the drawing
    return buffer.getvalue()


def score_against_ratio(results: Results, corpus: str) -> Figure | None:
    """The generative average and multiple choice side by side: a line a method, its intervals as bars, the
    uncompressed model as a line with its interval as a band. None where neither was measured.
    """
    measures = [m for m in (results.averages.generative, results.averages.choice) if m is not None]
    rows = results.panel.of_corpus(corpus)
    if not measures or not rows:
        return None
    with matplotlib.rc_context(_STYLE):
        legend_rows = 1 + len({row.method for row in rows}) // 3
        figure = Figure(figsize=(_WIDTH, 2.1 + 0.17 * legend_rows), layout="constrained")
        for axes, measure in zip(_row_of_axes(figure, len(measures)), measures, strict=True):
            _draw_lines(axes, results, rows, measure)
            axes.set_title(measure.label)
            axes.set_xlabel("compression ratio")
        figure.axes[0].set_ylabel("score (%)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, handlelength=2.4)
    return figure


def score_against_bytes(results: Results, corpus: str) -> Figure | None:
    """A panel a score, over the size of the weights on disk: a line for each method and way of storing the weights.

    Colour and marker are the method's; markers are filled where weights are not quantised. The star is the uncompressed
    model. Methods are set apart by up to 3 % of the size, so that intervals do not hide each other. None where nothing
    was measured, or where at every ratio all rows have the same size: then ``score_against_ratio`` says it all.
    """
    baseline = results.panel.baseline
    rows = sorted((row for row in results.panel.of_corpus(corpus) if weights_megabytes(row)), key=_megabytes)
    stand = results.averages
    measures = [m for m in (stand.generative, stand.choice, *stand.domains.values()) if m is not None]
    largest = max(map(_megabytes, [*rows, *filter(None, [baseline])]), default=0.0)
    if not measures or not _sizes_differ(rows, _SAME_SIZE * largest):
        return None
    unit, scale = ("GB", 1e-3) if largest >= 1000 else ("MB", 1.0)
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((_plain_method(row), _storage(row)), []).append(row)
    methods, storages = _looks_of_methods(series), _looks_of_storages(series)
    with matplotlib.rc_context(_STYLE):
        down = len(measures) // 2 + 1  # the last place is for the legend
        figure = Figure(figsize=(_WIDTH, 0.4 + 1.75 * down), layout="constrained")
        panels: list[Axes] = list(figure.subplots(down, 2, squeeze=False, sharex=True, sharey=True).flat)
        for axes, measure in zip(panels, measures, strict=False):
            axes.set(title=measure.label, ylim=(0, 103), xscale="log")
            if baseline is not None and (found := results.get(baseline, measure)) is not None:
                axes.axhline(100 * found.estimate.value, color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
                _draw_points(axes, results, measure, [scale * _megabytes(baseline)], [baseline], "baseline", _STAR)
            for (method, storage), own in series.items():
                apart = scale * (1 + 0.03 * (list(methods).index(method) / max(1, len(methods) - 1) - 0.5))
                look = storages[storage] | methods[method]
                places = [apart * _megabytes(row) for row in own]
                _draw_points(axes, results, measure, places, own, f"{method}, {storage}", look)
        ticks = _few_ticks(*panels[0].get_xlim())
        panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0].set_xticks([], minor=True)
        for axes in panels[max(0, len(measures) - 2) : len(measures)]:
            axes.tick_params(labelbottom=True)
        for axes in panels[len(measures) :]:
            axes.set_axis_off()
        figure.supxlabel(f"weights on disk ({unit})", fontsize=9)
        figure.supylabel("score (%)", fontsize=9)
        keys = [_key(name, look | {"linestyle": "none"}) for name, look in methods.items() if name != "baseline"]
        if len(storages) > 1:
            keys += [_key(name, {"color": "black", "marker": "o"} | look) for name, look in storages.items()]
        if baseline is not None:
            keys.append(_key("baseline", _STAR | {"linestyle": ":"}))
        if len(keys) <= 10:
            panels[-1].legend(handles=keys, loc="center", frameon=False, handlelength=2.6, borderpad=0)
        else:
            figure.set_figheight(figure.get_figheight() + 0.09 * len(keys))
            figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False, handlelength=2.6)
    return figure


def expert_usage(usage: Usage) -> Figure:
    """A panel a source: layers downwards, experts across (most used over all sources first)."""
    table = relative_usage(usage)
    layers = layer_names(usage)
    across = min(3, len(table))
    down = -(-len(table) // across)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(_WIDTH, 0.7 + down * max(1.1, 0.4 + 0.08 * len(layers))), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        highest = max(2.0, *(float(np.nanmax(values)) for values in table.values()))
        image = None
        for place, axes in enumerate(grid.flat):
            if place >= len(table):
                axes.set_visible(False)
                continue
            source = list(table)[place]
            image = axes.imshow(
                table[source], aspect="auto", cmap="cividis", vmin=0, vmax=highest, interpolation="nearest"
            )
            axes.set_title(source)
            step = -(-len(layers) // 8)
            axes.set_yticks(range(0, len(layers), step), layers[::step])
        figure.supxlabel("experts, most used over all sources first", fontsize=9)
        figure.supylabel("layer", fontsize=9)
        if image is not None:
            figure.colorbar(image, ax=grid, label="use (1 = balanced)", fraction=0.06)
    return figure


def corpus_by_domain(results: Results, method: str) -> Figure | None:
    """Calibration corpora against evaluation domains at each ratio: scores on the left, on the right
    perplexity as a multiple of the uncompressed model's. None where the method has fewer than two corpora.
    """
    rows = [row for row in results.panel.rows if row.method == method and row.calibration != NO_CORPUS]
    corpora, ratios = sorted({row.calibration for row in rows}), sorted({row.ratio for row in rows})
    scores, texts = by_domain(results)
    blocks = [block for block in (scores, texts) if block]
    if len(corpora) < 2 or not blocks:
        return None
    at = {(row.ratio, row.calibration): row for row in rows}
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        height = 0.9 + len(ratios) * (0.35 + 0.2 * len(corpora))
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        grid = figure.subplots(len(ratios), len(blocks), squeeze=False, sharex="col", sharey=True)
        for axes_of_block, block in zip(grid.T, blocks, strict=True):
            tables = [_block(results, block, [at.get((ratio, name)) for name in corpora]) for ratio in ratios]
            _draw_block(axes_of_block, block, tables, corpora)
        for axes, ratio in zip(grid[:, 0], ratios, strict=True):
            axes.set_ylabel(f"ratio {ratio:g}")
        figure.supylabel("calibration corpus", fontsize=9)
    return figure


def by_domain(results: Results) -> tuple[list[Measure], list[Measure]]:
    """Scores: of each generative domain and of choices (of those with parts the one that is named after their domain);
    perplexities of texts and of their parts."""
    records, stand = results.panel.records(), results.averages
    scores = [*stand.domains.values()]
    if stand.choice is not None:
        about = {column.domain for column in columns_of(records) if column.kind == CHOICE}
        parts = [m for m in part_measures(records, stand.choice) if m.parts[0].of in about]
        scores += parts or [stand.choice]
    if results.panel.baseline is None:
        return scores, []
    return scores, [m for text in stand.texts for m in part_measures(records, text) or [text]]


def _row_of_axes(figure: Figure, count: int) -> Sequence[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def _megabytes(row: Row) -> float:
    return weights_megabytes(row) or 0.0


def _sizes_differ(rows: Sequence[Row], by: float) -> bool:
    """At some ratio the sizes of two rows differ ``by`` so many megabytes or more."""
    at: dict[float, list[float]] = {}
    for row in rows:
        at.setdefault(row.ratio, []).append(_megabytes(row))
    return any(max(sizes) - min(sizes) >= by for sizes in at.values())


def _storage(row: Row) -> str:
    return str(row.records[0].cell.get("quantize") or _UNQUANTISED)


def _plain_method(row: Row) -> str:
    """The row's method without how its weights are stored."""
    return row.method.removesuffix(f" {_storage(row)}")


def _looks_of_methods(series: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    names = {method for method, _ in series} - {"baseline"}
    own = {name: {"color": colour, "marker": marker} for name, (colour, marker) in looks(names).items()}
    return own | {"baseline": {name: _STAR[name] for name in ("color", "marker", "markersize")}}


def _looks_of_storages(series: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    names = sorted({storage for _, storage in series}, key=lambda name: (name != _UNQUANTISED, name))
    of_storages = zip(itertools.cycle(_LINES), itertools.cycle(_FILLS), strict=False)
    return {
        name: {"linestyle": line, "fillstyle": fill} for name, (line, fill) in zip(names, of_storages, strict=False)
    }


def _key(label: str, look: dict[str, Any]) -> Line2D:
    options: dict[str, Any] = {"markersize": 4, "linewidth": 1.1, "label": label} | look
    return Line2D([], [], **options)


def _few_ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high`` for a logarithmic axis, at most five but for very wide ranges."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 5:
            break
    return ticks


def _draw_points(
    axes: Axes,
    results: Results,
    measure: Measure,
    places: Sequence[float],
    rows: Sequence[Row],
    label: str,
    look: dict[str, Any],
) -> None:
    """A line through the scores of ``rows`` at ``places``, with their intervals; those that are not finite are left
    out.
    """
    found = [
        (place, one.estimate) for place, row in zip(places, rows, strict=True) if (one := results.get(row, measure))
    ]
    found = [(place, one) for place, one in found if np.isfinite([one.value, one.low, one.high]).all()]
    if not found:
        return
    value, low, high = (100 * np.array([getattr(one, name) for _, one in found]) for name in ("value", "low", "high"))
    axes.errorbar(
        [place for place, _ in found],
        value,
        yerr=np.maximum(0, [value - low, high - value]),
        label=label,
        **{"markersize": 4, "linewidth": 1.1, "elinewidth": 0.7, "zorder": 2} | look,
    )


def _draw_lines(axes: Axes, results: Results, rows: Sequence[Row], measure: Measure) -> None:
    methods, ratios = sorted({row.method for row in rows}), sorted({row.ratio for row in rows})
    baseline = results.panel.baseline
    found = None if baseline is None else results.get(baseline, measure)
    if found is not None:
        axes.axhline(100 * found.estimate.value, color="#777777", linewidth=1.2, label="baseline", zorder=1)
        axes.axhspan(100 * found.estimate.low, 100 * found.estimate.high, color="#777777", alpha=0.15, linewidth=0)
    # Neighbours a little apart, so that intervals do not hide each other.
    gap = min(0.05, 0.4 * min(np.diff(ratios), default=0.125)) / max(1, len(methods) - 1)
    of_methods = looks(methods)
    for number, method in enumerate(methods):
        of_method = [row for row in rows if row.method == method]
        places = [row.ratio + gap * (number - (len(methods) - 1) / 2) for row in of_method]
        look = dict(zip(("color", "marker"), of_methods[method], strict=True))
        _draw_points(axes, results, measure, places, of_method, method, look)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_ylim(0, 103)  # the panels share the axis: one that is fitted to the first may cut the second


def _block(results: Results, measures: Sequence[Measure], rows: Sequence[Row | None]) -> np.ndarray:
    """(corpora, measures): scores in percent, perplexities as multiples of the baseline's; NaN if missing."""
    baseline = results.panel.baseline
    table = np.full((len(rows), len(measures)), np.nan)
    for down, row in enumerate(rows):
        for across, measure in enumerate(measures):
            found = None if row is None else results.get(row, measure)
            if found is None:
                continue
            if measure.kind != "perplexity":
                table[down, across] = 100 * found.estimate.value
            elif baseline is not None and (base := results.get(baseline, measure)) is not None:
                table[down, across] = found.estimate.value / base.estimate.value
    return table


def _draw_block(
    axes_of_block: Sequence[Axes],
    measures: Sequence[Measure],
    tables: Sequence[np.ndarray],
    corpora: Sequence[str],
) -> None:
    are_ratios = measures[0].kind == "perplexity"
    finite = np.concatenate([table[np.isfinite(table)] for table in tables])
    norm = LogNorm(1, max(2.0, finite.max(initial=1.0)), clip=True) if are_ratios else Normalize(0, 100)
    colours = matplotlib.colormaps["cividis_r" if are_ratios else "cividis"]
    for axes, table in zip(axes_of_block, tables, strict=True):
        axes.imshow(table, aspect="auto", cmap=colours, norm=norm)
        for (down, across), value in np.ndenumerate(table):
            if np.isnan(value):
                continue
            red, green, blue, _ = colours(norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{_short(value)}×" if are_ratios else f"{value:.0f}"
            axes.text(across, down, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        names = [measure.label.replace("multiple choice", "choice") for measure in measures]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(corpora)), corpora)
    axes_of_block[0].set_title("perplexity / baseline" if are_ratios else "score (%)")


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
