import pytest

from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.numbers.load import load_panels
from tests.reports.synthetic import BASELINE, RIGHT, make_cell

REAP = RIGHT["reap"][0.25]


def test_rows_are_sorted_and_seeds_are_one_row(panel):
    assert [(row.ratio, row.method) for row in panel.rows] == [
        (ratio, method) for ratio in (0.25, 0.5) for method in ("frequency", "hc_smoe", "random", "reap")
    ]
    assert [[r.cell["seed"] for r in row.records] for row in panel.rows if row.method == "random"] == [[0, 1, 2]] * 2
    assert panel.baseline.records[0].cell["method"] == "none" and panel.corpora() == ["mixed"]
    assert all(items is not None for row in panel.all_rows() for items in row.items)


def test_methods_without_calibration_stand_beside_every_corpus(tmp_path):
    store = RecordStore(tmp_path)
    for method, corpus in (("reap", "math"), ("reap", "code"), ("weight_norm", "none")):
        store.write(*make_cell(method, 0.25, corpus, 0, REAP))
    (panel,) = load_panels(tmp_path)
    assert panel.corpora() == ["code", "math"]
    assert [row.method for row in panel.of_corpus("code")] == ["reap", "weight_norm"]


def test_settings_that_differ_tell_rows_apart(tmp_path):
    store = RecordStore(tmp_path)
    for linkage in ("average", "single"):
        method = {"name": "hc_smoe", "linkage": linkage}
        store.write(*make_cell("hc_smoe", 0.25, "code", 0, REAP, {"method": method, "output_dir": f"x/{linkage}"}))
    single = {"method": {"name": "hc_smoe", "linkage": "single"}}
    store.write(*make_cell("hc_smoe", 0.5, "code", 0, REAP, single))
    store.write(*make_cell("reap", 0.25, "code", 0, REAP))
    (panel,) = load_panels(tmp_path)
    assert [(row.ratio, row.method) for row in panel.rows] == [
        (0.25, "hc_smoe (linkage=average)"),
        (0.25, "hc_smoe (linkage=single)"),
        (0.25, "reap"),
        (0.5, "hc_smoe (linkage=single)"),
    ]


def test_cells_that_nothing_tells_apart_are_refused(tmp_path):
    store = RecordStore(tmp_path)
    record, samples = make_cell("reap", 0.25, "code", 0, REAP)
    store.write(record, samples)
    record.cell["id"] = "again"
    store.write(record, samples)
    with pytest.raises(WinnowError, match="again .*same settings"):
        load_panels(tmp_path)


def test_each_suite_and_model_is_a_panel_with_its_own_baseline(tmp_path):
    for suite in ("demo", "reference"):
        for store, method, ratio in (
            (RecordStore(tmp_path), "reap", 0.25),
            (RecordStore(tmp_path, "baseline"), "none", 0.0),
        ):
            record, samples = make_cell(method, ratio, "code", 0, REAP if method == "reap" else BASELINE)
            record.cell.update(suite=suite, id=f"{method}-{suite}")
            store.write(record, samples)
    panels = load_panels(tmp_path)
    assert [(p.suite, p.baseline.records[0].cell["id"]) for p in panels] == [
        ("demo", "none-demo"),
        ("reference", "none-reference"),
    ]


def test_baseline_is_the_one_named_else_the_one_that_agrees(tmp_path):
    baselines = RecordStore(tmp_path, "baseline")
    for limit in (50, 100):
        record, samples = make_cell("none", 0.0, "none", 0, BASELINE, {"suite": {"limit": limit}})
        record.cell["id"] = f"base-{limit}"
        baselines.write(record, samples)
    record, samples = make_cell("reap", 0.25, "code", 0, REAP, {"suite": {"limit": 100}})
    RecordStore(tmp_path).write(record, samples)
    assert load_panels(tmp_path)[0].baseline.records[0].cell["id"] == "base-100"
    record.cell["baseline"] = "base-50"
    RecordStore(tmp_path).write(record, samples)
    assert load_panels(tmp_path)[0].baseline.records[0].cell["id"] == "base-50"
    del record.cell["baseline"]
    record.config["suite"] = {"limit": 7}
    RecordStore(tmp_path).write(record, samples)
    with pytest.raises(WinnowError, match="base-100 and base-50"):
        load_panels(tmp_path)


def test_no_records_and_damaged_records_are_one_clear_line(tmp_path):
    with pytest.raises(WinnowError, match="no folder"):
        load_panels(tmp_path / "nowhere")
    with pytest.raises(WinnowError, match="no records in"):
        load_panels(tmp_path)
    store = RecordStore(tmp_path)
    store.write(*make_cell("reap", 0.25, "code", 0, REAP))
    store.path(store.ids()[0]).write_text("{")
    with pytest.raises(WinnowError, match="damaged"):
        load_panels(tmp_path)


def test_baseline_alone_is_a_panel_without_rows(tmp_path):
    RecordStore(tmp_path, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    (panel,) = load_panels(tmp_path)
    assert panel.rows == () and panel.baseline is not None


def test_quantised_cells_are_rows_of_their_own_and_no_setting_is_named_for_them(tmp_path):
    store, baselines = RecordStore(tmp_path), RecordStore(tmp_path, "baseline")
    baselines.write(*make_cell("none", 0.0, "none", 0, BASELINE))
    old = {"seed": 0}  # a record from before there was such a stage
    for method, ratio, settings in (("reap", 0.25, old), ("none", 0.0, {}), ("reap", 0.25, {})):
        for label in ("int4-sym", "int8-g16-asym") if settings is not old else ("",):
            quantize = {"name": label[:4], "bits": int(label[3])} if label else None
            record, samples = make_cell(method, ratio, "mixed", 0, REAP, {"quantize": quantize} if label else settings)
            if label:
                record.cell["quantize"] = label
            record.cell["id"] += label
            store.write(record, samples)
    (panel,) = load_panels(tmp_path)
    assert [row.method for row in panel.rows] == [
        "baseline int4-sym", "baseline int8-g16-asym", "reap", "reap int4-sym", "reap int8-g16-asym",
    ]  # fmt: skip
    assert panel.baseline is not None and panel.baseline.records[0].cell["method"] == "none"
    assert len({row.key for row in panel.all_rows()}) == 6
