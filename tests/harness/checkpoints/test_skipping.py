"""Dynamic expert skipping: the thresholds, what routers then answer, and cells that skip."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from harness.backends import vllm_guard
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.tokens import TokenSequence
from harness.cells import run as experiment
from harness.cells.cell import prepare
from harness.checkpoints.config import read_config
from harness.checkpoints.load import load_model
from harness.checkpoints.skipping import (
    BINS,
    SECTION,
    Skip,
    Threshold,
    count_ratios,
    install,
    read_betas,
    write_thresholds,
)
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from tests.brute_force import moe_blocks, routed_documents, router_answer
from tests.tiny import ALL_FAMILIES, save_tiny, tiny_model

CONF = Path(experiment.__file__).parents[2] / "conf"
TEXT = "def add(a, b):\n    return a + b\nTom has 3 apples and buys 4 more."


def documents() -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (30, 7, 19)]


def ratios_of(gates: np.ndarray) -> list[float]:
    """Of every token all gate values but the largest, divided by it."""
    found = []
    for values in gates.tolist():
        ordered = sorted(values, reverse=True)
        found += [value / ordered[0] for value in ordered[1:]]
    return found


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_pass_counts_the_ratios_of_real_tokens(top_k):
    model = tiny_model("qwen3_moe", top_k=top_k)
    sequences = [TokenSequence(np.array(d), (len(d),), ("text",)) for d in documents()]
    counts = gate_ratio_counts(model, sequences, FAMILIES["qwen3_moe"], batch_size=2)
    for layer, routed in routed_documents(model, documents()).items():
        ratios = ratios_of(np.concatenate([document.gates for document in routed]))
        assert counts[layer].sum() == len(ratios) == 56 * (top_k - 1)
        median = Skip("calibrated", quantile=0.5).threshold(counts[layer], top_k)
        assert sum(ratio < median.beta for ratio in ratios) == pytest.approx(len(ratios) / 2, abs=1)
        assert median.share == pytest.approx(sum(r < median.beta for r in ratios) / (56 * top_k), abs=1 / 56)
        fixed = Skip("fixed", beta=0.3).threshold(counts[layer], top_k)
        assert (fixed.beta, fixed.share) == (0.3, pytest.approx(sum(r < 0.3 for r in ratios) / (56 * top_k), abs=0.02))


def test_a_quantile_is_the_share_that_is_skipped():
    counts = count_ratios(torch.tensor([[1.0, 0.1, 0.8], [0.5, 0.1, 0.2], [2.0, 1.2, 0.0]]))  # .1 .8 .2 .4 .6 0
    assert counts.sum() == 6 and counts[0] == 1
    betas = [Skip("calibrated", quantile=share).threshold(counts.numpy(), 3).beta for share in (0, 0.5, 1)]
    assert betas[0] == 0 and 0.2 < betas[1] <= 0.4 and 0.8 < betas[2] <= 0.8 + 2 / BINS
    assert Skip("calibrated", quantile=0.5).threshold(counts.numpy(), 3).share == pytest.approx(3 / 9)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_computes_without_the_experts_that_a_token_skips(tmp_path, family):
    model = save_tiny(tmp_path / "model", family, top_k=2)
    layers = list(moe_blocks(model))
    write_thresholds(tmp_path / "model", dict.fromkeys(layers, Threshold(0.7, 0.0)))
    answers: dict[bool, list[dict[str, torch.Tensor]]] = {False: [], True: []}
    ids = torch.tensor(documents()[:1])
    for skipping, one in ((False, model), (True, load_model(tmp_path / "model", "float32"))):
        router = moe_blocks(one)[layers[0]].router
        router.register_forward_hook(
            lambda module, args, output, skipping=skipping: answers[skipping].append(router_answer(output, 8))
        )
        with torch.no_grad():
            one(ids, use_cache=False)
    (before,), (after,) = answers[False], answers[True]
    assert torch.equal(before["indices"], after["indices"])
    skipped = 0
    for old, new in zip(before["gates"].tolist(), after["gates"].tolist(), strict=True):
        left = [value if value >= 0.7 * max(old) else 0.0 for value in old]
        assert new == pytest.approx([value * sum(old) / sum(left) for value in left], rel=1e-5)
        skipped += left.count(0.0)
    assert 0 < skipped < len(before["gates"])


def test_beta_zero_changes_no_bit_and_beta_one_leaves_the_largest():
    model = tiny_model("mixtral")
    ids = torch.tensor(documents()[:1])
    with torch.no_grad():
        before = model(ids).logits
        install(model, FAMILIES["mixtral"], {0: 0.0, 1: 0.0})
        assert torch.equal(model(ids).logits, before)
        install(model, FAMILIES["mixtral"], {0: 1.0})
        model.model.layers[0].mlp.gate.register_forward_hook(lambda _, args, output: seen.append(output[1]))
        seen: list[torch.Tensor] = []
        assert not torch.allclose(model(ids).logits, before)
    assert ((seen[0] == 0).sum(1) == 1).all()
    torch.testing.assert_close(seen[0].sum(1), torch.ones(30))


def arguments(folder: Path, *more: str) -> list[str]:
    if not (folder / "model").exists():
        save_tiny(folder / "model", "qwen3_moe")
        (folder / "corpus.jsonl").write_text(3 * (json.dumps({"text": TEXT}) + "\n"))
    return [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none",
        f"output_dir={folder / 'out'}", "progress=false", *more,
    ]  # fmt: skip


def configured(folder: Path, *more: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=arguments(folder, *more))


COMPOSED = {
    "none": ("method=none", "ratio=0"),
    "pruned": ("method=reap", "ratio=0.5"),
    "merged": ("method=hc_smoe", "ratio=0.5"),
    "ragged": ("method=coverage", "ratio=0.5", "method.align=4"),
    "quantised": ("method=weight_norm", "ratio=0.5", "quantize=int8", "quantize.group_size=row"),
}


@pytest.mark.parametrize("plan", COMPOSED)
def test_skipping_composes_with_any_plan(tmp_path, plan):
    record = experiment.run_cell(configured(tmp_path, *COMPOSED[plan], "skip=calibrated"))
    assert (record.cell["skip"], record.cell["calibration"]) == ("calibrated-0.5", "local")
    (checkpoint,) = (tmp_path / "out").rglob("checkpoint")
    betas = read_betas(read_config(checkpoint))
    assert betas == {int(layer): summary["skip"]["beta"] for layer, summary in record.plan.items()}
    assert all(0 < beta <= 1 for beta in betas.values()) and len(set(betas.values())) == 2
    assert [summary["skip"]["share"] for summary in record.plan.values()] == pytest.approx([0.25, 0.25], abs=0.02)
    ids, logits = torch.tensor(documents()[:1]), []
    for section in (True, False):
        if not section:
            config = {key: value for key, value in read_config(checkpoint).items() if key != SECTION}
            (checkpoint / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            logits.append(load_model(checkpoint, "float32")(ids).logits)
    assert not torch.allclose(*logits)


def test_the_thresholds_are_those_of_the_compressed_model(tmp_path):
    whole = experiment.run_cell(configured(tmp_path, "method=none", "ratio=0", "skip=calibrated"))
    pruned = experiment.run_cell(configured(tmp_path, "method=reap", "ratio=0.5", "skip=calibrated"))
    betas = [[layer["skip"]["beta"] for layer in record.plan.values()] for record in (whole, pruned)]
    assert betas[0] != betas[1]


def test_skipping_makes_another_cell_of_the_same_baseline(tmp_path):
    plain, *others = (
        prepare(configured(tmp_path, "method=reap", *more))
        for more in ((), ("skip=calibrated",), ("skip=fixed",), ("skip=fixed", "skip.beta=0.2"))
    )
    assert len({plain.id, *(other.id for other in others)}) == 4
    assert {other.baseline["id"] for other in others} == {plain.baseline["id"]}
    assert "skip" not in plain.description
    assert [other.description["skip"] for other in others] == ["calibrated-0.5", "fixed-0.3", "fixed-0.2"]


REFUSED = {
    "both": (("skip=calibrated", "skip.quantile=null"), "needs a skip.quantile or a skip.beta from 0 to 1"),
    "outside": (("skip=fixed", "skip.beta=1.5"), "skip.beta=1.5: should be less than or equal to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused(tmp_path, case):
    more, message = REFUSED[case]
    with pytest.raises(Exception, match=message):
        prepare(configured(tmp_path, *more))


def test_models_that_cannot_skip_are_refused(tmp_path):
    config = configured(tmp_path, "method=none", "ratio=0", "skip=calibrated")
    save_tiny(tmp_path / "top1", "qwen3_moe", top_k=1)
    config.model.path = str(tmp_path / "top1")
    with pytest.raises(WinnowError, match="top-k of at least 2: this one has top-1"):
        prepare(config)
    config.model.path = str(tmp_path / "model")
    write_thresholds(tmp_path / "model", {0: Threshold(0.5, 0.0)})
    with pytest.raises(WinnowError, match="skips experts already"):
        prepare(config)


def test_vllm_is_told_why_it_cannot(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(vllm_guard, "installed_version", lambda: "0.32.0")
    assert "known to the transformers backend alone" in vllm_guard.reason_against({SECTION: {}})
    with pytest.raises(WinnowError, match="backend=vllm: dynamic expert skipping"):
        prepare(configured(tmp_path, "skip=calibrated", "backend=vllm"))
    assert prepare(configured(tmp_path, "skip=calibrated")).config["backend"]["name"] == "hf"
    assert "dynamic expert skipping" in caplog.text


def test_a_section_that_cannot_be_read_is_refused():
    with pytest.raises(WinnowError, match="skipping version 2 is newer"):
        read_betas({SECTION: {"version": 2}})
    with pytest.raises(WinnowError, match="does not say how experts are skipped"):
        read_betas({SECTION: {"version": 1, "beta": [0.1]}})
