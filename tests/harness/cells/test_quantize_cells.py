"""Quantization as a stage of a cell: ids, records, sweeps, the baseline, and one line for every mistake."""

import json
from pathlib import Path

import pytest

from harness.backends.hf import open_checkpoint
from tests.harness.test_cli import _logging_as_before, local, winnow  # noqa: F401
from tests.tiny import save_tiny

TASKS = ("math", "writing", "multiple_choice", "perplexity", "diversity")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "qwen3_moe")
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in ("Tom has 3 apples.", "def f(): pass")))
    return path


def records(out: Path) -> dict[tuple[str, str], dict]:
    """(method, quantize) -> record."""
    found = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    return {(record["cell"]["method"], record["cell"].get("quantize", "none")): record for record in found}


def test_a_sweep_over_quantization_has_a_cell_for_each_and_keeps_the_ids_of_the_others(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    arguments = local(model, corpus, out, "method=coverage,reap", "ratio=0.5", "quantize=none,int4,int8")
    assert winnow(monkeypatch, "-m", *arguments) == 0
    found = records(out)
    assert found.keys() == {(m, q) for m in ("coverage", "reap") for q in ("none", "int4-sym", "int8-sym")}
    assert len({record["cell"]["id"] for record in found.values()}) == 6
    logs = "".join(path.read_text() for path in out.glob("sweeps/*/logs/*.log"))
    assert logs.count("calibration pass over") == 1
    for method in ("coverage", "reap"):
        plain, int4, int8 = (found[method, name] for name in ("none", "int4-sym", "int8-sym"))
        for record, bits in ((int4, 4), (int8, 8)):
            sizes, quantization = record["sizes"], record["sizes"]["quantization"]
            assert "__int" in record["cell"]["id"] and "quantize" in record["timings"]
            assert record["plan"] == plain["plan"]
            assert sizes["expert_parameters"] == plain["sizes"]["expert_parameters"] == quantization["parameters"]
            assert sizes["baseline_expert_bytes"] == plain["sizes"]["baseline_expert_bytes"]
            folder = out / "cells" / record["cell"]["id"] / "checkpoint"
            assert sizes["weights_bytes"] == (folder / "model.safetensors").stat().st_size
            assert sizes["expert_bytes"] == quantization["bytes"] and quantization["bits"] == bits
        assert int4["sizes"]["expert_bytes"] < int8["sizes"]["expert_bytes"] < plain["sizes"]["expert_bytes"]
        assert "quantization" not in plain["sizes"] and "quantize" not in plain["cell"]
    alone = tmp_path / "alone"
    assert winnow(monkeypatch, "-m", *local(model, corpus, alone, "method=reap", "ratio=0.5")) == 0
    assert records(alone)["reap", "none"]["cell"]["id"] == found["reap", "none"]["cell"]["id"]


def test_the_uncompressed_model_quantised_is_a_cell_beside_the_baseline(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "model=local", f"model.path={model}", "method=none", "ratio=0", "suite.items=1", f"output_dir={out}",
        "backend=hf", *(f"~suite.tasks.{name}" for name in TASKS),
    ]  # fmt: skip
    asked = ["quantize=int8", "quantize.symmetric=false", "quantize.group_size=8"]
    assert winnow(monkeypatch, *arguments, *asked) == 0
    shown = capsys.readouterr().out
    assert "quantize=int8-g8-asym" in shown and "memory reduction" in shown and "difference" in shown
    (record,) = records(out).values()
    (baseline,) = (json.loads(path.read_text()) for path in (out / "baseline").glob("*.json"))
    assert record["cell"]["baseline"] == baseline["cell"]["id"] != record["cell"]["id"]
    assert "quantize" not in baseline["cell"] and "weights" not in baseline["engine"]
    assert "dequantised" in record["engine"]["weights"]
    assert record["sizes"]["baseline_weights_bytes"] == baseline["sizes"]["weights_bytes"]
    assert record["sizes"]["weights_bytes"] < baseline["sizes"]["weights_bytes"]
    assert winnow(monkeypatch, *arguments) == 0
    assert len(list((out / "baseline").glob("*.json"))) == len(records(out)) == 1


def test_the_checkpoint_of_a_quantised_cell_opens_by_itself_but_is_no_model_to_compress(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert winnow(monkeypatch, *local(model, corpus, out, "method=reap", "ratio=0.5", "quantize=int4")) == 0
    backend = open_checkpoint(str(out / "checkpoint"), "float32", "cpu", 4, None)
    assert backend.loglikelihood([("a", "b")])[0].logprob < 0
    capsys.readouterr()
    assert winnow(monkeypatch, *local(out / "checkpoint", corpus, tmp_path / "again", "method=reap")) == 2
    assert "quantised already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize=int3"], "unknown quantize 'int3'; known: int4, int8, none"),
        (["quantize=int4", "quantize.bits=5"], "quantize.bits=5: should be 4 or 8"),
        (["quantize=int4", "quantize.group_size=24"], "the inputs of the gate and up projections (32): 32, 16, 8, 4"),
        (["quantize=int4", "quantize.group_size=32"], "down_proj.weight (16): 16, 8, 4 would fit"),
    ],
)
def test_a_mistake_gets_one_line(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    assert winnow(monkeypatch, *local(model, corpus, tmp_path / "out", "method=weight_norm", *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("records/*.json"))


def test_stacked_experts_are_refused_before_any_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "granite", "granitemoe")
    arguments = local(tmp_path / "granite", corpus, tmp_path / "out", "method=reap", "quantize=int4")
    assert winnow(monkeypatch, *arguments) == 2
    assert "stack the experts" in capsys.readouterr().err
    assert not (tmp_path / "out" / "calibration").exists()
