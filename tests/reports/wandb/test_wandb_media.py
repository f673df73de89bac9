"""What a cell's run on W&B is made of, before W&B sees it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from harness.contracts.record import Sample, Score
from harness.errors import WinnowError
from reports.wandb.media import cell_media, drift_figure, drift_rows, expert_map, generation_rows, layer_histograms
from tests.wandb_log import PLAN, make_record, make_samples, write_tracked_sweep


def test_rows_hold_only_generated_texts_and_so_many_a_task():
    likelihoods = [Sample("multiple_choice", "q", 1.0)]
    writing = [Sample("writing", f"w{i}", 1.0, output="text") for i in range(5)]
    rows = generation_rows([*likelihoods, *writing, *make_samples("text")], [], most=2)
    assert [(row[0], row[2]) for row in rows] == [
        ("code", "c0"),
        ("code", "c1"),
        ("writing", "w0"),
        ("writing", "w1"),
    ]


def test_baseline_text_is_that_of_the_same_task_and_item():
    ours = [Sample("code", "1", 1.0, output="a"), Sample("math", "1", math.nan, output="b")]
    theirs = [Sample("math", "1", 1.0, output="B"), Sample("code", "2", 1.0, output="C")]
    rows = generation_rows(ours, theirs, most=9)
    assert [(row[5], row[6]) for row in rows] == [("a", None), ("b", "B")]
    assert rows[1][3] is None  # NaN is no JSON


def test_expert_map_shows_removed_alone_merged_and_channels():
    groups, channels = [axes for axes in expert_map(make_record(), PLAN["layers"]).axes if axes.images]
    shown = np.ma.filled(groups.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[1, np.nan, 1, 1], [3, 3, 1, 3]])
    kept = np.ma.filled(channels.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(kept, [[8, np.nan, 3, 8], [np.nan] * 4])  # layer 3 keeps all: none was cut
    assert [label.get_text() for label in groups.get_yticklabels()] == ["1", "3"]


def test_expert_map_leaves_out_what_stands_for_experts():
    """A constant before an expert whose channels were cut: the widths in the record are those of the stored ones."""
    one, cut = (
        {"sources": [{"expert": 1, "weight": 1.0}], "channels": None},
        {"sources": [{"expert": 2, "weight": 1.0}]},
    )
    constant = {"sources": [], "channels": None, "constant": "layers.1.experts.0.constant"}
    layers = [{"layer": 1, "experts": [constant, one, cut | {"channels": [0, 3]}], "route": [0, 1, 2, None]}]
    record = replace(make_record(), plan={"1": {"experts": 2, "rows": 3, "group_sizes": [], "widths": [6, 2]}})
    groups, channels = [axes for axes in expert_map(record, layers).axes if axes.images]
    for axes, expected in ((groups, [math.nan, 1, 1, math.nan]), (channels, [math.nan, 6, 2, math.nan])):
        (image,) = axes.images
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), math.nan)[0], expected)


def test_expert_map_has_no_channels_where_none_was_cut_and_needs_a_plan():
    record = replace(make_record(), plan={})
    assert len([axes for axes in expert_map(record, PLAN["layers"]).axes if axes.images]) == 1
    assert expert_map(record, []) is None


def test_usage_keeps_every_token_where_experts_outnumber_the_bins():
    counts = list(range(1, 1026))
    record = replace(make_record(), expert_usage={"code": {"7": counts}})
    sums, edges = layer_histograms(record, {})[7]["usage/code"]
    assert sums.sum() == sum(counts) and len(sums) <= 512 and len(edges) == len(sums) + 1
    assert (sums[0], edges[0], edges[1]) == (1 + 2 + 3, 0, 3)


def test_saliency_that_is_not_finite_is_left_out():
    layers = layer_histograms(replace(make_record(), expert_usage={}), {"0": [math.nan, None], "1": [1.0, math.inf]})
    assert list(layers) == [1] and layers[1]["saliency"][0].tolist() == [1]


def test_drift_needs_positions():
    record = replace(make_record(), scores=[Score("drift", "js", 0.2, 9, 0.1, 0.3)])
    assert drift_rows(record) == [] and drift_figure(record, None) is None


def test_drift_figure_shows_the_cell_by_position():
    figure = drift_figure(make_record(), None)
    (line,), labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["reap"] and line.lines[0].get_xdata().tolist() == [1, 2, 4]
    assert line.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_files_of_the_cell_that_are_damaged_are_named(tmp_path):
    record, samples, folder = write_tracked_sweep(tmp_path)
    (folder / "saliency.json").write_text(json.dumps({"layers": 1})[:-2])
    with pytest.raises(WinnowError, match=r"saliency\.json is damaged: delete it"):
        cell_media(record, samples, tmp_path, folder, 3)
