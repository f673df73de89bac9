"""Cells that prune in rounds, with a calibration pass over what is left before each."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from harness import cli
from harness.calibration.calibrate import calibrate
from harness.calibration.tokens import tokenize
from harness.cells import compress as compressing
from harness.cells import run as experiment
from harness.cells.cell import Cell, prepare
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.plan import CompressionPlan, prune
from harness.contracts.plan_files import load_plan
from harness.data.rows import Document
from methods.prune_experts import ExpertPruning
from tests.in_process import everything_here
from tests.tiny import save_tiny

TEXTS = 3 * ["def add(a, b):\n    return a + b\nTom has 3 apples and buys 4 more."]


@pytest.fixture(autouse=True)
def _logging_as_before():
    """Hydra leaves handlers on streams that pytest closes; later tests would write to them."""
    handlers, level = cli.logging.root.handlers[:], cli.logging.root.level
    yield
    cli.logging.root.handlers[:] = handlers
    cli.logging.root.setLevel(level)
    cli.logging.captureWarnings(False)


def arguments(folder: Path, *more: str) -> list[str]:
    """A cell of a tiny model, with ``folder`` as its output folder."""
    if not (folder / "model").exists():
        save_tiny(folder / "model", "qwen3_moe")
        (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none",
        f"output_dir={folder / 'out'}", "progress=false", "ratio=0.5", *more,
    ]  # fmt: skip


def winnow(monkeypatch, folder: Path, *more: str) -> int:
    monkeypatch.setattr("sys.argv", ["winnow", *arguments(folder, *more)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def cell(folder: Path, *more: str) -> Cell:
    conf = Path(experiment.__file__).parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        return prepare(compose("config", overrides=arguments(folder, *more)))


def by_hand(folder: Path) -> CompressionPlan:
    """Two rounds of reap that leave 6, then 4 of 8 experts, on checkpoints written by hand."""
    reap, original, smaller = ExpertPruning("reap", "reap"), folder / "model", folder / "smaller"
    sequences = tokenize([Document(text) for text in TEXTS], load_tokenizer(original), 64)

    def kept(model: Path, ratio: Fraction) -> dict[int, list[int]]:
        statistics, _ = calibrate(
            model, lambda: load_model(model, "float32"), sequences, reap.requires, folder / "other"
        )
        plan = reap.decide(statistics, ratio, seed=0).plan
        return {layer.layer: [new.sources[0].expert for new in layer.experts] for layer in plan.layers}

    first = kept(original, Fraction(1, 4))
    apply_plan(original, CompressionPlan(tuple(prune(n, 8, six) for n, six in first.items())), smaller)
    second = kept(smaller, Fraction(1, 3))
    return CompressionPlan(tuple(prune(n, 8, [first[n][j] for j in four]) for n, four in second.items()))


def test_each_round_sees_what_the_last_one_left_and_a_stopped_cell_goes_on(tmp_path, monkeypatch):
    in_rounds = ("method=reap", "schedule=iterative", "schedule.rounds=2")
    assert winnow(monkeypatch, tmp_path, *in_rounds) == 0
    out = tmp_path / "out"
    plan = load_plan(out / "plan.json")
    assert plan == by_hand(tmp_path)
    assert not (out / "rounds").exists()
    assert len([path for path in (out / "calibration").iterdir() if path.is_dir()]) == 2
    (path,) = (out / "records").glob("*__reap__*.json")
    record = json.loads(path.read_text())
    assert (record["cell"]["method"], record["cell"]["schedule"]) == ("reap", "iterative-2")
    assert {layer["experts"] for layer in record["plan"].values()} == {4}
    assert all(len(counts) == 8 for source in record["expert_usage"].values() for counts in source.values())
    whole = record["sizes"]["baseline_expert_parameters"]
    assert record["sizes"]["expert_parameters"] * 2 == whole
    saliency = json.loads((out / "saliency.json").read_text())["layers"]
    assert {len(values) for values in saliency.values()} == {8}
    load_model(out / "checkpoint")

    path.unlink()
    everything_here(monkeypatch)
    monkeypatch.setattr(compressing, "open_for_pass", lambda *_, **__: pytest.fail("another pass"))
    assert winnow(monkeypatch, tmp_path, *in_rounds) == 0
    assert load_plan(out / "plan.json") == plan and path.exists()


def test_rounds_change_what_goes(tmp_path, monkeypatch):
    plans = []
    for rounds in ("schedule=one_shot", "schedule=iterative"):
        out = tmp_path / rounds.partition("=")[2]
        assert winnow(monkeypatch, tmp_path, "method=reap", rounds, f"output_dir={out}") == 0
        plans.append(load_plan(out / "plan.json"))
    assert plans[0] != plans[1]


def test_naee_prunes_in_rounds_too(tmp_path, monkeypatch):
    assert winnow(monkeypatch, tmp_path, "method=naee", "schedule=iterative", "schedule.rounds=2") == 0
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert {len(layer.experts) for layer in plan.layers} == {4}


def test_one_round_is_the_cell_that_it_always_was(tmp_path):
    one_shot = cell(tmp_path, "method=reap")
    assert cell(tmp_path, "method=reap", "schedule=iterative", "schedule.rounds=1").id == one_shot.id
    assert "schedule" not in one_shot.description
    ids = {cell(tmp_path, "method=reap", "schedule=iterative", f"schedule.rounds={n}").id for n in (2, 3)}
    assert len(ids | {one_shot.id}) == 3
    assert cell(tmp_path, "method=reap", "schedule=iterative").baseline == one_shot.baseline


def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    assert winnow(monkeypatch, tmp_path, "method=hc_smoe", "schedule=iterative") == 2
    assert "method 'hc_smoe' needs schedule=one_shot" in capsys.readouterr().err
    assert winnow(monkeypatch, tmp_path, "method=hc_smoe", "schedule=iterative", "dry_run=true") == 2
    assert "method 'hc_smoe' needs schedule=one_shot" in capsys.readouterr().err
