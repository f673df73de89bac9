"""Ids follow what decides a cell's numbers, and nothing else."""

from typing import Any

import pytest

from harness.records.identity import identified, without

CELL = {
    "model": "reference", "method": "reap", "ratio": 0.5, "calibration": "code", "seed": 0, "suite": "mine",
    "backend": "hf",
}  # fmt: skip


def config() -> dict[str, Any]:
    return {
        "model": {"path": "somewhere", "dtype": "float32", "device": "cpu"},
        "method": {"_target_": "methods.prune_experts.ExpertPruning", "name": "reap", "scope": "layer"},
        "calibration": {"name": "code", "max_length": 64, "statistics": "auto", "batch_size": 8, "corpus": {"a": 1}},
        "suite": {"name": "mine", "tasks": {"code": {"_target_": "tasks.code.CodeTask", "items": 4, "root": "x"}}},
        "backend": {"name": "hf", "open": {"_target_": "harness.backends.hf.open_checkpoint", "engine": {}}},
        "layout": "compact",
        "lower_top_k": False,
        "quantize": {"name": "int4", "_target_": "harness.quantize.Quantization", "bits": 4},
    }  # fmt: skip


def ids(
    cell: dict[str, Any] = CELL, settings: dict[str, Any] | None = None, model: str = "sha256:1", method: str = "1",
    tasks: dict[str, str] | None = None,
) -> tuple[str, str]:  # fmt: skip
    described, baseline = identified(cell, settings or config(), model, method, tasks or {"code": "1"})
    assert described["baseline"] == baseline["id"]
    return described["id"], baseline["id"]


def changed(*path: str, to: Any) -> dict[str, Any]:
    found = config()
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return found


@pytest.mark.parametrize(
    "path",
    [
        ("method", "_target_"),
        ("suite", "tasks", "code", "_target_"),
        ("suite", "tasks", "code", "root"),
        ("suite", "tasks", "code", "domain"),
        ("calibration", "statistics"),
        ("calibration", "batch_size"),
        ("calibration", "corpus"),
        ("model", "path"),
        ("model", "device"),
        ("quantize", "bits"),  # no stage of this cell
    ],
)
def test_what_changes_no_number_changes_no_id(path: tuple[str, ...]):
    assert ids(settings=changed(*path, to="other")) == ids()


@pytest.mark.parametrize(
    ("path", "of_baseline"),
    [
        (("method", "scope"), False),
        (("calibration", "max_length"), False),
        (("layout",), False),
        (("lower_top_k",), False),
        (("suite", "tasks", "code", "items"), True),
        (("model", "dtype"), True),
        (("backend", "open", "engine"), True),
    ],
)
def test_what_changes_a_number_changes_the_id(path: tuple[str, ...], of_baseline: bool):
    (cell, baseline), (before, before_baseline) = ids(settings=changed(*path, to="other")), ids()
    assert cell != before
    assert (baseline != before_baseline) is of_baseline


def test_versions_and_weights_are_part_of_the_id():
    cell, baseline = ids()
    assert ids(method="2")[0] != cell and ids(method="2")[1] == baseline
    assert ids(tasks={"code": "2"})[0] != cell and ids(tasks={"code": "2"})[1] != baseline
    assert ids(model="sha256:2")[0] != cell and ids(model="sha256:2")[1] != baseline


def test_a_stage_counts_where_the_cell_has_it():
    with_stage = CELL | {"quantize": "int4-sym"}
    assert ids(with_stage)[0] != ids(with_stage, changed("quantize", "bits", to=8))[0]
    assert ids(with_stage)[1] == ids()[1]


def test_a_method_that_reads_no_text_is_the_same_on_every_corpus():
    alone = CELL | {"calibration": "none"}
    assert ids(alone) == ids(alone, changed("calibration", "max_length", to=9))


def test_where_code_lies_is_left_out_at_any_depth():
    node = {"_target_": "a.B", "first": {"_target_": "c.D", "name": "x"}, "parts": ["_target_"]}
    assert without(node, ()) == {"first": {"name": "x"}, "parts": ["_target_"]}
