"""Ids follow what decides a cell's numbers, and nothing else."""

from typing import Any

import pytest

from harness.records.identity import changes, identified, identity, without

CELL = {
    "model": "reference", "method": "reap", "ratio": 0.5, "calibration": "code", "seed": 0, "suite": "mine",
    "backend": "hf",
}  # fmt: skip
CONTENTS = {"model": "sha256:1", "tokenizer": "sha256:2", "corpus": "sha256:3", "items/code": "sha256:4"}
VERSIONS = {"torch": "2.13", "platform": "Linux"}


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
    cell: dict[str, Any] = CELL, settings: dict[str, Any] | None = None, method: str = "1",
    tasks: dict[str, str] | None = None, versions: dict[str, str] | None = None, **contents: str,
) -> tuple[str, str]:  # fmt: skip
    read = CONTENTS | {name.replace("_", "/"): print_ for name, print_ in contents.items()}
    made_with = VERSIONS | (versions or {})
    described, baseline = identified(cell, settings or config(), read, method, tasks or {"code": "1"}, made_with)
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
        ("calibration", "max_length"),  # what it changes is the content of the corpus
        ("backend", "open", "batch_size"),
        ("backend", "open", "gpu_memory_utilization"),
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
        (("layout",), False),
        (("lower_top_k",), False),
        (("suite", "tasks", "code", "items"), True),
        (("model", "dtype"), True),
        (("backend", "open", "engine"), True),
        (("backend", "open", "max_length"), True),
        (("backend", "open", "max_logprobs"), True),
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
    for content in ("model", "tokenizer", "items_code", "code_code"):
        changed_content = ids(**{content: "sha256:9"})
        assert changed_content[0] != cell and changed_content[1] != baseline, content
    for content in ("corpus", "code_method"):
        changed_content = ids(**{content: "sha256:9"})
        assert changed_content[0] != cell and changed_content[1] == baseline, content


def test_versions_of_packages_count_where_it_is_asked_for():
    strict = config() | {"strict_versions": True}
    assert ids(versions={"torch": "2.14"}) == ids()
    assert ids(settings=strict)[0] != ids()[0]
    new = ids(settings=strict, versions={"torch": "2.14"})
    assert new[0] != ids(settings=strict)[0] and new[1] != ids(settings=strict)[1]
    assert ids(settings=strict, versions={"platform": "another"}) == ids(settings=strict)


def test_a_setting_that_says_nothing_renames_nothing():
    without_value = config()
    without_value["backend"]["open"] |= {"new": None, "more": {}}
    without_value["method"] |= {"new": None}
    assert ids(settings=without_value) == ids()


def test_what_has_changed_is_named():
    before = identity(CELL, config(), CONTENTS, "1", {"code": "1"}, VERSIONS)[0]
    moved = CONTENTS | {"corpus": "sha256:9", "items/code": "sha256:9", "tokenizer": "sha256:9"}
    settings = changed("backend", "open", "max_length", to=512)
    now = identity(CELL, settings, moved, "2", {"code": "1"}, VERSIONS)[0]
    assert changes(before, before) == []
    assert changes(before, now) == [
        "backend.max_length None -> 512", "the calibration text changed", "the items of code changed",
        "the tokenizer's files changed", "method_version 1 -> 2",
    ]  # fmt: skip


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
