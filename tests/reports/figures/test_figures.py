"""What is drawn, read back from the figures' own objects."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from harness.records.store import RecordStore
from reports.figures.scores import corpus_by_domain, expert_usage, render, score_against_bytes, score_against_ratio
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from reports.numbers.usage import collect_usage
from tests.reports.synthetic import BASELINE, BASELINE_BYTES, RIGHT, make_cell


def test_lines_show_the_scores_with_bars_and_the_baseline(results):
    figure = score_against_ratio(results, "mixed")
    generative, choices = figure.axes
    assert (generative.get_title(), choices.get_title()) == ("generative average", "multiple choice")
    lines = dict(zip(*reversed(choices.get_legend_handles_labels()), strict=True))
    assert set(lines) == {"baseline", "frequency", "hc_smoe", "random", "reap"}
    values, _, (bars,) = lines["reap"].lines
    assert values.get_ydata().tolist() == pytest.approx([76.0, 64.0])
    assert values.get_xdata() == pytest.approx([0.25, 0.5], abs=0.03)
    low, high = bars.get_segments()[0][:, 1]
    assert low == pytest.approx(66.8, abs=0.1) and high == pytest.approx(83.3, abs=0.1)  # Wilson of 76 in 100
    assert lines["baseline"].get_ydata()[0] == pytest.approx(80.0)
    assert len({line.lines[0].get_color() for name, line in lines.items() if name != "baseline"}) == 4


def test_usage_panels(corpora_results):
    usage = collect_usage(record for row in corpora_results.panel.rows for record in row.records)
    figure = expert_usage(usage)
    panels = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.get_title()}
    assert set(panels) == {"code", "math", "mixed"}
    assert panels["code"].shape == (4, 16)
    assert np.nanmean(panels["math"]) == pytest.approx(1.0)


def test_corpus_by_domain(corpora_results):
    figure = corpus_by_domain(corpora_results, "reap")
    scores, texts, *_ = figure.axes
    assert scores.images[0].get_array().tolist() == pytest.approx(
        np.array([[85, 55, 85, 76], [55, 70, 85, 76], [85, 70, 85, 76]])
    )
    assert [label.get_text() for label in scores.get_yticklabels()] == ["code", "math", "mixed"]
    assert texts.images[0].get_array().tolist() == pytest.approx(np.full((3, 5), 1.1))  # 4.4 / 4.0
    assert texts.texts[0].get_text() == "1.1×"
    assert scores.get_ylabel() == "ratio 0.25" and len(figure.axes) == 4


def test_corpus_by_domain_needs_two_corpora(results):
    assert corpus_by_domain(results, "reap") is None


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_files_are_reproducible(kind, magic):
    def draw() -> bytes:
        figure = Figure()
        figure.subplots().plot([1, 2])
        return render(figure, kind)

    assert draw().startswith(magic) and draw() == draw()


def quantised_sweep(folder: Path, scale: int = 1) -> None:
    """``reap`` and ``frequency`` with weights as they are and at a third of the bytes, and the baseline at a third."""
    store = RecordStore(folder)
    cells = [(method, ratio) for method in ("reap", "frequency") for ratio in (0.25, 0.5)]
    RecordStore(folder, "baseline").write(*sized("none", 0.0, BASELINE, scale))
    for method, ratio in cells:
        store.write(*sized(method, ratio, RIGHT[method][ratio], scale))
        store.write(*sized(method, ratio, RIGHT[method][ratio], scale, quantize="int4-sym"))
    store.write(*sized("none", 0.0, RIGHT["reap"][0.25], scale, quantize="int4-sym"))


def sized(method: str, ratio: float, right: dict, scale: int, quantize: str = ""):
    record, samples = make_cell(method, ratio, "none" if method == "none" else "mixed", 0, right)
    stored = record.sizes["weights_bytes"] * scale
    cell = record.cell
    if quantize:
        stored //= 3
        cell = cell | {"id": f"{cell['id']}-{quantize}", "quantize": quantize}
    return replace(record, cell=cell, sizes=record.sizes | {"weights_bytes": stored}), samples


def test_bytes_have_a_line_for_each_method_and_way_of_storing(tmp_path):
    quantised_sweep(tmp_path)
    (panel,) = load_panels(tmp_path)
    figure = score_against_bytes(evaluate(panel), "mixed")
    titles = ["generative average", "multiple choice", "code", "math", "writing"]
    assert [axes.get_title() for axes in figure.axes] == [*titles, ""]
    code = figure.axes[2]
    lines = dict(zip(*reversed(code.get_legend_handles_labels()), strict=True))
    ways = ("not quantised", "int4-sym")
    assert set(lines) == {"baseline", "baseline, int4-sym", *(f"{m}, {w}" for m in ("reap", "frequency") for w in ways)}
    whole = BASELINE_BYTES / 1e6
    plain, small = (lines[f"reap, {way}"].lines[0] for way in ways)
    assert plain.get_xdata() == pytest.approx([whole * 0.6, whole * 0.8], rel=0.016)  # the smallest first
    assert small.get_xdata() == pytest.approx([whole * 0.2, whole * 0.8 / 3], rel=0.016)
    assert plain.get_ydata().tolist() == small.get_ydata().tolist() == pytest.approx([60, 85])
    assert (plain.get_fillstyle(), small.get_fillstyle()) == ("full", "none")
    assert plain.get_color() == small.get_color() != lines["frequency, int4-sym"].lines[0].get_color()
    low, high = lines["reap, int4-sym"].lines[2][0].get_segments()[1][:, 1]
    assert low == pytest.approx(70.9, abs=0.1) and high == pytest.approx(92.9, abs=0.1)  # Wilson of 34 in 40
    star = lines["baseline"].lines[0]
    assert (star.get_xdata().tolist(), star.get_ydata().tolist()) == ([whole], pytest.approx([90]))
    keys = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert keys == ["frequency", "reap", "not quantised", "int4-sym", "baseline"]
    assert figure.get_supxlabel() == "weights on disk (MB)"
    assert [label.get_text() for label in figure.axes[4].get_xticklabels()] == ["5", "10", "20"]


def test_bytes_of_large_models_are_gigabytes(tmp_path):
    quantised_sweep(tmp_path, scale=1000)
    (panel,) = load_panels(tmp_path)
    figure = score_against_bytes(evaluate(panel), "mixed")
    assert figure.get_supxlabel() == "weights on disk (GB)"
    low, high = figure.axes[0].get_xlim()
    assert 1 < low < 4.1 and 20 < high < 40


def test_bytes_are_not_drawn_where_the_ratio_tells_them(results):
    assert score_against_bytes(results, "mixed") is None
