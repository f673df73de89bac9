"""The command line as a person meets it: what is written where, what is skipped, and one line for every mistake."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import cli
from harness.cells import run as experiment
from harness.checkpoints import writer as checkpoint_writer
from harness.sweeps import plugin
from reports.numbers.load import load_panels
from tests.in_process import everything_here
from tests.tiny import save_tiny

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Tom has 3 apples and buys 4 more.",
    "The mill stood by the river.",
]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Hydra leaves handlers on streams that pytest closes; later tests would write to them."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_tiny(folder, "olmoe")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS))
    return path


def winnow(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["winnow", *map(str, arguments), "progress=false"])
    plugin.failed.clear()
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def local(model: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=local", f"model.path={model}", "calibration=local", f"calibration.path={corpus}",
        "calibration.max_length=64", "suite=none", f"output_dir={out}", *more,
    ]  # fmt: skip


def test_one_cell_writes_plan_saliency_checkpoint_and_one_record(
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert winnow(monkeypatch, *local(model, corpus, out, "method=reap", "ratio=0.25")) == 0
    plan = json.loads((out / "plan.json").read_text())
    saliency = json.loads((out / "saliency.json").read_text())
    assert [layer["layer"] for layer in plan["layers"]] == [0, 1]
    assert saliency["method"] == "reap"
    for layer in plan["layers"]:
        values = saliency["layers"][str(layer["layer"])]
        kept = sorted(range(8), key=lambda j: -values[j])[:6]
        assert [e["sources"] for e in layer["experts"]] == [[{"expert": j, "weight": 1.0}] for j in sorted(kept)]
        assert [new is not None for new in layer["route"]] == [j in kept for j in range(8)]
    assert json.loads((out / "checkpoint" / "config.json").read_text())["num_experts"] == 6
    (record,) = (out / "records").glob("*.json")
    content = json.loads(record.read_text())
    assert content["sizes"]["expert_parameters"] * 4 == content["sizes"]["baseline_expert_parameters"] * 3
    assert content["versions"]["torch"] == torch.__version__
    written = record.stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(experiment, "_compute", None)  # would fail if it were called
    assert winnow(monkeypatch, *local(model, corpus, out, "method=reap", "ratio=0.25")) == 0
    assert record.stat().st_mtime_ns == written
    assert "ratio=0.25" in capsys.readouterr().out


def test_merging_writes_groups(model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert winnow(monkeypatch, *local(model, corpus, out, "method=hc_smoe", "ratio=0.5")) == 0
    why = json.loads((out / "saliency.json").read_text())
    assert {len(set(labels)) for labels in why["groups"].values()} == {4}
    sizes = json.loads(next((out / "records").glob("*.json")).read_text())["sizes"]
    assert sizes["layout"] == "compact"
    expanded = tmp_path / "expanded"
    assert winnow(monkeypatch, *local(model, corpus, expanded, "method=hc_smoe", "ratio=0.5", "layout=expanded")) == 0
    on_disk = (expanded / "checkpoint" / "model.safetensors").stat().st_size
    assert abs(sizes["expanded_weights_bytes"] - on_disk) <= 64  # the header's padding
    assert sizes["weights_bytes"] < on_disk


def test_a_sweep_calibrates_once_a_corpus_and_evaluates_the_baseline_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    arguments = [
        "-m", "model=local", f"model.path={model}", "method=reap,hc_smoe", "ratio=0.25,0.5", "calibration=code,math",
        "calibration.num_sequences=4", "suite.items=1", f"output_dir={out}",
        *(f"~suite.tasks.{name}" for name in ("math", "writing", "multiple_choice", "perplexity", "diversity")),
    ]  # fmt: skip
    assert winnow(monkeypatch, *arguments) == 0
    logs = "".join(path.read_text() for path in out.glob("sweeps/*/logs/*.log"))
    assert len(list((out / "records").glob("*.json"))) == 8
    assert logs.count("calibration pass over") == 2
    assert logs.count("reusing calibration statistics") == 8
    assert logs.count("evaluating the uncompressed model") == 1
    assert "[12/12] report: done" in capfd.readouterr().out
    assert len(list((out / "baseline").glob("*.json"))) == 1


def test_settings_that_a_method_does_not_use_do_not_make_another_cell(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    arguments = local(model, corpus, out, "method=random,weight_norm", "ratio=0.5", "seed=0,1")
    assert winnow(monkeypatch, "-m", *arguments, "calibration.num_sequences=2,3") == 0
    names = sorted(path.name.split("-")[0] for path in (out / "records").glob("*.json"))
    assert names == [
        "model__random__0.5__none__s0", "model__random__0.5__none__s1", "model__weight_norm__0.5__none__s0",
    ]  # fmt: skip


def test_a_broken_cell_does_not_stop_the_sweep(
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "sweep"
    assert winnow(monkeypatch, "-m", *local(model, corpus, out, "ratio=0.99,0.25")) == 1
    assert len(list((out / "records").glob("*.json"))) == 1
    assert "1 jobs of the sweep failed" in capfd.readouterr().err
    assert winnow(monkeypatch, "-m", *local(model, corpus, out, "ratio=0.25")) == 0


def test_an_interrupted_cell_is_redone(
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "evaluate_apart", interrupt)
        assert winnow(monkeypatch, *local(model, corpus, out)) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert not list((out / "records").glob("*.json"))
    assert winnow(monkeypatch, *local(model, corpus, out)) == 0
    assert len(list((out / "records").glob("*.json"))) == 1


def _no_weights(model: Path, corpus: Path) -> None:
    (model / "model.safetensors").unlink()


def _truncated(model: Path, corpus: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _unsupported(model: Path, corpus: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def _nan(model: Path, corpus: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.experts.3.down_proj.weight"][:] = float("nan")
    weights["model.layers.1.mlp.gate.weight"][3] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def _empty(model: Path, corpus: Path) -> None:
    corpus.write_text('{"text": ""}\n')


def _nothing(model: Path, corpus: Path) -> None: ...


MISTAKES = {
    "unknown method": (["method=foo"], _nothing, ["unknown method 'foo'", "reap", "hc_smoe"]),
    "unknown corpus": (
        ["calibration=foo"],
        _nothing,
        ["unknown calibration 'foo'", "evol_codealpaca", "code"],
    ),
    "ratio of one": (["ratio=1"], _nothing, ["ratio 1 is outside [0, 1)"]),
    "fewer than top-k": (
        ["ratio=0.9"],
        _nothing,
        ["fewer than top-k = 2", "largest ratio that works is 0.75"],
    ),
    "no weights": ([], _no_weights, ["no weights"]),
    "truncated": ([], _truncated, ["model.safetensors"]),
    "architecture": ([], _unsupported, ["'llama' is not supported", "mixtral", "harness/families/table.py"]),
    "nan": ([], _nan, ["NaN", "layer 1"]),
    "empty corpus": ([], _empty, ["empty"]),
    "no path": (["model.path=???"], _nothing, ["model.path"]),
    "unknown setting": (["colour=red"], _nothing, ["colour"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    name: str, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more, spoil, expected = MISTAKES[name]
    spoil(model, corpus)
    out = tmp_path / "out"
    kept = [a for a in local(model, corpus, out) if a.split("=")[0] not in {m.split("=")[0] for m in more}]
    arguments = kept if name != "unknown corpus" else [a for a in kept if not a.startswith("calibration.")]
    assert winnow(monkeypatch, *arguments, *more) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("winnow:")]
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert not (out / "checkpoint").exists()
    assert not list(out.glob("records/*.json"))


def test_an_output_folder_that_cannot_be_made(
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    assert winnow(monkeypatch, *local(model, corpus, tmp_path / "file" / "out")) == 2
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("winnow:")]) == 1


def test_a_full_disk_leaves_no_half_written_checkpoint(
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    everything_here(monkeypatch)
    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    assert winnow(monkeypatch, *local(model, corpus, out)) == 2
    assert "no space" in capfd.readouterr().err.lower()
    assert not (out / "checkpoint").exists()
    assert not list(out.glob("records/*.json"))


def test_two_models_in_folders_of_one_name_are_two_models(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sweep: their records, their calibration, and their names in a report."""
    for place, seed in (("a", 0), ("b", 1)):
        save_tiny(tmp_path / place / "checkpoint", "olmoe", seed=seed)
    paths = ",".join(str(tmp_path / place / "checkpoint") for place in "ab")
    arguments = local(Path("none"), corpus, tmp_path / "out", "method=reap", "ratio=0.5")
    arguments = [f"model.path={paths}" if word.startswith("model.path=") else word for word in arguments]
    assert winnow(monkeypatch, "-m", *arguments) == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert len({record["cell"]["id"] for record in records}) == 2
    assert len({record["fingerprints"]["model"] for record in records}) == 2
    assert {record["cell"]["model"] for record in records} == {"checkpoint"}
    assert {panel.model for panel in load_panels(tmp_path / "out")} == {
        "checkpoint (a/checkpoint)",
        "checkpoint (b/checkpoint)",
    }
