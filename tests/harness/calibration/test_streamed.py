"""One layer at a time is the whole model: every family and statistic, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.calibration.collect import collect
from harness.calibration.collected import Part
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.streamed import Model, StreamedModel, chunks
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.quantize import Quantization, quantize_checkpoint
from harness.checkpoints.skipping import Threshold, write_thresholds
from harness.contracts.alignment import align_channels
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from harness.layers.diagnose import diagnose
from tests.harness.calibration.streams import assert_same, packed, plain, streamed
from tests.harness.checkpoints.compressed import ragged_plan
from tests.tiny import ALL_FAMILIES, tiny_model

ALL = frozenset(STATISTICS)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_statistic_of_every_family(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    row, model = FAMILIES[family], streamed(tmp_path)
    whole = load_model(tmp_path)
    assert_same(collect(model, plain(), row, ALL, 2), collect(whole, plain(), row, ALL, 2))
    if row.separates_packed:
        assert_same(collect(model, packed(), row, ALL, 2), collect(whole, packed(), row, ALL, 2))
    left = {name for name, parameter in model.skeleton.named_parameters() if not parameter.is_meta}
    assert not any(".layers." in name for name in left), "layers are taken out of memory again"
    rounded = collect(streamed(tmp_path, "bfloat16"), plain(), row, ALL, 2)
    assert_same(rounded, collect(load_model(tmp_path, "bfloat16"), plain(), row, ALL, 2))


def test_tied_embeddings_and_the_logits_behind_the_last_layer(tmp_path: Path) -> None:
    for number, family in enumerate(("qwen3_moe", "granitemoe", "gpt_oss")):
        model = tiny_model(family)
        if family != "gpt_oss":
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(tmp_path / str(number))
        by_layer = streamed(tmp_path / str(number)).model
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, 12:] = 0
        inputs = {"input_ids": torch.arange(40).reshape(2, 20), "attention_mask": mask}
        with torch.inference_mode():
            hidden = None
            for layer in by_layer.layers(range(by_layer.depth)):
                hidden = by_layer.run(layer, hidden, inputs)
            with by_layer.head():
                found = by_layer.logits(hidden, inputs)
            assert torch.equal(found, load_model(tmp_path / str(number))(**inputs).logits)
        assert by_layer.skeleton.get_output_embeddings().weight.is_meta
        assert not by_layer.skeleton.get_input_embeddings().weight.is_meta


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_compressed_checkpoints_that_skip_experts(family: str, tmp_path: Path) -> None:
    """Routes, experts of many widths and rows that are removed; the thresholds of config.json are heeded."""
    tiny_model(family).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    apply_plan(tmp_path / "model", ragged_plan(), tmp_path / "out")
    write_thresholds(tmp_path / "out", {0: Threshold(0.3, 0.1), 1: Threshold(0.6, 0.2)})
    row, whole = FAMILIES[family], load_model(tmp_path / "out")
    names = frozenset({"ean_sum", "output_mean", "frequency"})  # what has the experts that are stored, not router rows
    assert_same(collect(streamed(tmp_path / "out"), plain(), row, names, 2), collect(whole, plain(), row, names, 2))
    counts = gate_ratio_counts(whole, plain(), row, 2)
    found = gate_ratio_counts(streamed(tmp_path / "out"), plain(), row, 2)
    assert found.keys() == counts.keys() and all(bins.sum() == 143 for bins in counts.values())
    for layer, bins in counts.items():
        np.testing.assert_array_equal(found[layer], bins)


def test_packed_weights_are_dequantised_as_they_are_read(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", Quantization("int4", 4, targets="linear"))
    row, whole = FAMILIES["qwen3_moe"], load_model(tmp_path / "out")
    assert_same(collect(streamed(tmp_path / "out"), plain(), row, ALL, 2), collect(whole, plain(), row, ALL, 2))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_corpus_that_does_not_fit_goes_through_in_parts(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    row, model, whole = FAMILIES[family], streamed(tmp_path), load_model(tmp_path)
    sequences = [*plain((40, 33, 40, 21, 9, 15, 3, 1)), *packed()][: None if row.separates_packed else 8]
    small = StreamedModel(model.model, memory=80 * 32 * 4)  # a batch of two sequences of 40 positions
    cut = chunks(small, sequences, 2)
    assert len(cut) > 2 and len(chunks(model, sequences, 2)) == 1
    assert_same(collect(small, sequences, row, ALL, 2), collect(whole, sequences, row, ALL, 2), bound=1e-6)
    part = Part(70, 1000)  # of a larger corpus: as a shard
    found, expected = (collect(each, sequences, row, ALL, 2, part=part) for each in (small, whole))
    assert_same(found, expected, bound=1e-6)
    assert found.steps.keys() == expected.steps.keys()
    for layer, steps in expected.steps.items():
        for name, step in steps.items():
            np.testing.assert_allclose(found.steps[layer][name].decay, step.decay, rtol=1e-12)
            limit = 1e-6 * np.abs(step.from_zero).max()
            np.testing.assert_allclose(found.steps[layer][name].from_zero, step.from_zero, rtol=0, atol=limit)
    counts = gate_ratio_counts(whole, sequences, row, 2)
    for layer, bins in gate_ratio_counts(small, sequences, row, 2).items():
        np.testing.assert_array_equal(bins, counts[layer])
    with pytest.raises(WinnowError, match="hidden states of one batch need .* set calibration.batch_size lower"):
        collect(StreamedModel(model.model, memory=80 * 32 * 4 - 1), sequences, row, ALL, 2)


def test_layer_diagnostics_are_the_same(tmp_path: Path) -> None:
    """Also where only the original model is larger than memory."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    opened: list[Path] = []

    def diagnosed(before: Callable[[Path], Model], after: Callable[[Path], Model]) -> dict[str, Any]:
        def load(folder: Path) -> Model:
            opened.append(folder)
            return before(folder) if folder == tmp_path / "model" else after(folder)

        return diagnose(
            tmp_path / "model", ragged_plan(), packed(), tmp_path / "scratch", load, align_channels, batch_size=2
        )

    expected = diagnosed(load_model, load_model)
    for before, after in ((streamed, streamed), (streamed, load_model), (load_model, streamed)):
        assert diagnosed(before, after) == expected
    assert opened == [tmp_path / "model", tmp_path / "scratch"] * 4 and not (tmp_path / "scratch").exists()
