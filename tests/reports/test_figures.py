"""What is drawn, read back from the figures' own objects."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from reports.figures import corpus_by_domain, expert_usage, render, score_against_ratio
from reports.usage import collect_usage


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
