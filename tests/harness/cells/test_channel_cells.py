"""Cells that prune channels: their records, what is refused before the calibration pass, and stacked experts."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import cli
from harness.calibration.calibrate import calibrate
from harness.calibration.tokens import TokenSequence
from harness.cells import run as experiment
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.load import load_model
from harness.contracts.plan_files import load_plan
from harness.contracts.shape import MoeShape
from harness.families.table import FAMILIES
from methods.coverage import Coverage
from tests.harness.checkpoints.compressed import compressed_by_hand, logits
from tests.tiny import save_tiny, tiny_model

STACKED = ("gpt_oss", "granitemoe", "granitemoeshared")
WIDTH = 16


@pytest.fixture(autouse=True)
def _logging_as_before():
    """Hydra leaves handlers on streams that pytest closes; later tests would write to them."""
    handlers, level = cli.logging.root.handlers[:], cli.logging.root.level
    yield
    cli.logging.root.handlers[:] = handlers
    cli.logging.root.setLevel(level)
    cli.logging.captureWarnings(False)


def winnow(monkeypatch, folder: Path, family: str, *more: str) -> int:
    """One cell of a tiny model, with ``folder`` as its output folder; the exit status."""
    if not (folder / "model").exists():
        save_tiny(folder / "model", family)
        text = "def add(a, b):\n    return a + b\nTom has 3 apples and buys 4 more."
        (folder / "corpus.jsonl").write_text(3 * (json.dumps({"text": text}) + "\n"))
    arguments = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none",
        f"output_dir={folder / 'out'}", "progress=false",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["winnow", *arguments, *more])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def record_of(folder: Path, method: str) -> dict:
    (path,) = (folder / "out" / "records").glob(f"*__{method}__*.json")
    return json.loads(path.read_text())


def test_the_record_has_the_widths_where_channels_were_cut_and_only_there(tmp_path, monkeypatch):
    assert winnow(monkeypatch, tmp_path, "qwen3_moe", "method=coverage", "method.align=1", "ratio=0.5") == 0
    plan = load_plan(tmp_path / "out" / "plan.json")
    found = record_of(tmp_path, "coverage")["plan"]
    for layer in plan.layers:
        widths = [WIDTH if new.channels is None else len(new.channels) for new in layer.experts]
        assert found[str(layer.layer)]["widths"] == widths
        assert found[str(layer.layer)]["experts"] == len(widths)
    assert sum(sum(layer["widths"]) for layer in found.values()) == 2 * 8 * WIDTH // 2
    assert len({width for layer in found.values() for width in layer["widths"]}) > 2
    alone = f"output_dir={tmp_path / 'pruned' / 'out'}"
    assert winnow(monkeypatch, tmp_path, "qwen3_moe", "method=reap", "ratio=0.5", alone) == 0
    pruned = record_of(tmp_path / "pruned", "reap")["plan"]
    assert all(layer.keys() == {"experts", "rows", "group_sizes"} for layer in pruned.values())


REFUSED = {
    "align": ("qwen3_moe", ["method=coverage", "method.align=5"], "does not divide the 16 channels of an expert; th"),
    "too few channels": ("qwen3_moe", ["method=activation_channels", "ratio=0.9"], "largest ratio that works is 0.75"),
    "too few in a chain": ("qwen3_moe", ["method=reap_coverage", "ratio=0.9"], "after its first stage 'reap'"),
    "gpt-oss": ("gpt_oss", ["method=coverage"], "experts of a layer share a tensor"),
    "granite": ("granitemoe", ["method=reap_coverage"], "experts of a layer share a tensor"),
    "groups": ("deepseek_v3", ["method=coverage"], "does not fit a group-limited router; use layout=uniform"),
    "groups, global": ("deepseek_v3", ["method=reap", "method.scope=global"], "group-limited router; use scope=layer"),
    "rows": ("deepseek_v3", ["method=reap", "ratio=0.75"], "fewer than the 4 that the router needs; the largest"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_the_calibration_pass(name, tmp_path, monkeypatch, capsys):
    family, more, message = REFUSED[name]
    monkeypatch.setattr(experiment, "compress", None)  # would fail if it were called
    assert winnow(monkeypatch, tmp_path, family, "ratio=0.5", *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("winnow:")]
    assert len(lines) == 1 and message in lines[0]


def test_the_shape_that_methods_are_checked_with():
    assert FAMILIES["gpt_oss"].shape(tiny_model("gpt_oss").config.to_dict()) == MoeShape(
        8, 2, 1, 2, WIDTH, 2, one_width=True
    )
    deepseek = tiny_model("deepseek_v3").config.to_dict()
    assert FAMILIES["deepseek_v3"].shape(deepseek) == MoeShape(8, 2, 2, 2, WIDTH, 4, one_width=False)


@pytest.mark.parametrize("budget", ["uniform", "coverage"])
@pytest.mark.parametrize("family", STACKED)
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_stacked_experts_lose_the_same_number_of_channels(family, budget, tmp_path):
    """Interleaved gate and up rows and their biases included; against the stock model with those channels at zero."""
    model = save_tiny(tmp_path / "model", family)
    generator = np.random.default_rng(2)
    sequences = [TokenSequence(generator.integers(0, 256, n), (n,), ("text",)) for n in (40, 25)]
    method = Coverage("c", layout="uniform", layer_budget=budget, channel_score="weight_activation")
    statistics, _ = calibrate(tmp_path / "model", lambda: model, sequences, method.requires, tmp_path / "cache")
    config = read_config(tmp_path / "model")
    method.check(FAMILIES[family].shape(config), "3/8")
    plan = method.decide(statistics, Fraction(3, 8), 0).plan
    sizes = apply_plan(tmp_path / "model", plan, tmp_path / "out")
    assert len({new.channels for layer in plan.layers for new in layer.experts}) > 8
    layouts = layer_layouts(read_config(tmp_path / "out"), FAMILIES[family])
    assert sum(sum(layout.widths) for layout in layouts.values()) == 2 * 8 * 10
    if budget == "uniform":
        assert sizes["layout"] == "plain" and {layout.width for layout in layouts.values()} == {10}
    expected = logits(compressed_by_hand(tiny_model(family), plan))
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
