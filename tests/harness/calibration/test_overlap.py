"""The fitness of searched budgets: against float64 loops over real logits, and against checkpoints that are pruned."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration import overlap
from harness.calibration.overlap import Comparison, remembered, spaced
from harness.calibration.routers import RoutersOf
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.load import load_model
from harness.contracts.plan import CompressionPlan, prune
from harness.errors import WinnowError
from harness.families.table import family_of
from tests.harness.calibration.streams import packed, plain, streamed
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, save_tiny

# Numbers of experts that the routers of both groups can share, and that differ between layers.
FEW, MANY = [0, 2, 5, 7], [1, 2, 3, 4, 6, 7]


def saved(folder: Path, family: str) -> Path:
    save_tiny(folder / "model", family)
    return folder / "model"


def kept_of(folder: Path, *experts: list[int]) -> dict[int, list[int]]:
    """The MoE layers keep the first, the second, the first again, ..."""
    config = read_config(folder)
    layers = family_of(config).moe_layers(config)
    return {layer: experts[place % len(experts)] for place, layer in enumerate(layers)}


def pruned(folder: Path, kept: Mapping[int, Sequence[int]], target: Path) -> Path:
    apply_plan(folder, CompressionPlan(tuple(prune(layer, 8, experts) for layer, experts in kept.items())), target)
    return target


def by_hand(intact: Path, fewer: Path, sequences: Sequence[TokenSequence]) -> float:
    """One document after the other, in float64: no batch, no padding, no mask."""
    models = [load_model(folder, "float64") for folder in (intact, fewer)]
    overlaps = []
    for sequence in sequences:
        start = 0
        for length in sequence.lengths:
            ids = torch.from_numpy(sequence.input_ids[start : start + length]).unsqueeze(0)
            start += length
            with torch.no_grad():
                both = [model(ids, use_cache=False).logits[0].numpy() for model in models]
            for one, other in zip(*both, strict=True):
                p, q = (np.exp(logits - logits.max()) for logits in (one, other))
                overlaps.append(np.minimum(p / p.sum(), q / q.sum()).sum())
    return float(np.mean(overlaps))


def comparison(folder: Path, sequences: Sequence[TokenSequence], dtype: str = "float32", size: int = 3) -> Comparison:
    return Comparison(load_model(folder, dtype), family_of(read_config(folder)), sequences, size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("overlap"), "olmoe")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_routers_answer_as_those_of_the_pruned_checkpoint(tmp_path: Path, family: str) -> None:
    """Softmax before and after top-k, sigmoids with correction biases, groups, sparsemixer: the same logits."""
    folder = saved(tmp_path, family)
    kept = kept_of(folder, FEW, MANY)
    whole, fewer = load_model(folder, "float64"), load_model(pruned(folder, kept, tmp_path / "pruned"), "float64")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (3, 30)))
    routers = RoutersOf(whole, family_of(read_config(folder)))
    with torch.inference_mode():
        before, expected = whole(ids).logits, fewer(ids).logits
        with routers.keeping(kept):
            found = whole(ids).logits
        assert torch.equal(whole(ids).logits, before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - before).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("text", [plain, packed])
def test_overlap_by_hand(tmp_path: Path, family: str, text) -> None:
    folder, sequences = saved(tmp_path, family), text()
    asked = [kept_of(folder, FEW, MANY), kept_of(folder, MANY, FEW), kept_of(folder, list(range(8)))]
    found = comparison(folder, sequences, "float64").overlaps(asked)
    single = comparison(folder, sequences, "float32").overlaps(asked)
    for number, kept in enumerate(asked[:2]):
        expected = by_hand(folder, pruned(folder, kept, tmp_path / f"pruned-{number}"), sequences)
        assert expected < 0.95
        assert found[number] == pytest.approx(expected, rel=1e-12)
        assert single[number] == pytest.approx(expected, rel=1e-6)
    assert found[2] == pytest.approx(1.0, rel=1e-14)


def test_slices_and_batches_change_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sequences = [kept_of(model, FEW, MANY), kept_of(model, MANY)], plain()
    expected = comparison(model, sequences, "float64").overlaps(asked)
    monkeypatch.setattr(overlap, "LOGITS", 7 * 300)
    through: list[int] = []
    in_slices = comparison(model, sequences, "float64", size=2)
    assert in_slices.overlaps(asked, through.append) == pytest.approx(expected, rel=1e-13)
    assert sum(through) == in_slices.tokens == sum(len(one.input_ids) for one in sequences) and len(through) == 3
    assert in_slices.overlaps(asked[1:]) == pytest.approx(expected[1:], rel=1e-13)  # by the states that were kept


def test_the_intact_model_runs_once(model: Path) -> None:
    looked_at = comparison(model, plain())
    forwards: list[object] = []
    looked_at._decoder._model.model.layers[0].register_forward_hook(lambda *args: forwards.append(args[0]))
    looked_at.overlaps([kept_of(model, FEW), kept_of(model, MANY)])
    looked_at.overlaps([kept_of(model, MANY, FEW)])
    assert len(forwards) == (1 + 3) * 2  # five sequences are two batches


def test_numbers_that_are_not_finite(model: Path) -> None:
    broken = load_model(model, "float32")
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(WinnowError, match="the model's logits are not finite: check its weights, or set model.dtype"):
        Comparison(broken, family_of(read_config(model)), plain(), 8).overlaps([kept_of(model, FEW)])


def test_a_budget_that_leaves_a_broken_expert_alone_is_worth_nothing(tmp_path: Path) -> None:
    """The intact model never calls it on this text, and what is left calls it for every token."""
    one_token = [TokenSequence(np.array([17]), (1,), ("a",))]
    model = saved(tmp_path, "qwen3_moe")  # whose gate values are those of the chosen experts alone
    broken = load_model(model, "float32")
    block = broken.model.layers[0].mlp
    chosen: list[int] = []
    hook = block.gate.register_forward_hook(lambda module, args, output: chosen.extend(output[2].flatten().tolist()))
    with torch.no_grad():
        broken(torch.tensor([[17]]))
    hook.remove()
    (unused, *_) = sorted(set(range(8)) - set(chosen))
    with torch.no_grad():
        block.experts.down_proj[unused] = float("inf")
    looked_at = Comparison(broken, family_of(read_config(model)), one_token, 1)
    alone, without = ({0: sorted([chosen[0], expert]), 1: list(range(8))} for expert in (unused, chosen[1]))
    assert looked_at.overlaps([alone, without]) == [0.0, pytest.approx(1.0, rel=1e-6)]


def test_a_model_read_layer_by_layer_is_refused(model: Path) -> None:
    with pytest.raises(WinnowError, match="read one layer at a time: take more or larger devices"):
        Comparison(streamed(model), family_of(read_config(model)), plain(), 8)
    with pytest.raises(WinnowError, match="outside the model's vocabulary"):
        comparison(model, [TokenSequence(np.array([4000]), (1,), ("a",))])


def test_samples_are_evenly_spaced() -> None:
    sequences = plain((5,) * 10)
    places = {id(one): place for place, one in enumerate(sequences)}
    for samples, expected in ((4, [0, 2, 5, 7]), (1, [0]), (10, list(range(10))), (99, list(range(10)))):
        assert [places[id(one)] for one in spaced(sequences, samples)] == expected


# --- what has been looked at ------------------------------------------------------------------------------------------


class Counting:
    """Stands for a ``Comparison`` on ten tokens: the overlap is the share of experts that are kept."""

    tokens = 10

    def __init__(self, fail_at: int = 99) -> None:
        self.asked: list[int] = []
        self.fail_at = fail_at

    def overlaps(self, asked, advance):
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(len(asked))
        advance(10)
        return [sum(map(len, kept.values())) / 16 for kept in asked]


KEPT = [{0: list(range(count)), 1: [0, 1, 2]} for count in range(3, 8)]
OF = {"model": "sha256:1", "dtype": "float32", "device": "cpu", "batch_size": 8}


def asked_of(folder: Path, counting: Counting, *groups: list[dict[int, list[int]]], **of: object) -> list[list[float]]:
    with remembered(lambda: counting, folder, {**OF, **of}, plain(), 9) as found:  # type: ignore[arg-type, return-value]
        return [found(group) for group in groups]


def test_what_was_looked_at_is_not_looked_at_again(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    assert asked_of(tmp_path, first, KEPT[:2], KEPT[1:4]) == [[6 / 16, 7 / 16], [7 / 16, 8 / 16, 9 / 16]]
    assert first.asked == [2, 2]
    assert asked_of(tmp_path, again, KEPT) == [[(6 + more) / 16 for more in range(5)]]
    assert again.asked == [1]
    (file,) = tmp_path.glob("*.json")
    told = json.loads(file.read_text())
    assert told["of"].items() >= OF.items() and len(told["overlaps"]) == 5


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    stopped, second = Counting(fail_at=1), Counting()
    with pytest.raises(KeyboardInterrupt):
        asked_of(tmp_path, stopped, KEPT[:3], KEPT[3:])
    asked_of(tmp_path, second, KEPT[:3], KEPT[3:])
    assert (stopped.asked, second.asked) == ([3], [2])


@pytest.mark.parametrize("changed", [{"model": "sha256:2"}, {"dtype": "bfloat16"}, {"batch_size": 4}])
def test_other_content_is_looked_at_anew(tmp_path: Path, changed: dict[str, object]) -> None:
    asked_of(tmp_path, Counting(), KEPT)
    counting = Counting()
    asked_of(tmp_path, counting, KEPT, **changed)
    assert counting.asked == [5] and len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["", "{", '{"overlaps": [1]}', '{"overlaps": {"a": "b"}}', "[]"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    asked_of(tmp_path, Counting(), KEPT)
    (file,) = tmp_path.glob("*.json")
    file.write_text(damage)
    counting = Counting()
    with caplog.at_level(logging.WARNING):
        asked_of(tmp_path, counting, KEPT)
    assert counting.asked == [5] and "is damaged" in caplog.text
    assert len(json.loads(file.read_text())["overlaps"]) == 5


def test_two_searches_at_once_keep_what_both_have_seen(tmp_path: Path) -> None:
    one, other = Counting(), Counting()
    with remembered(lambda: one, tmp_path, OF, plain(), 9) as first:  # type: ignore[arg-type, return-value]
        first(KEPT[:2])
        asked_of(tmp_path, other, KEPT[2:4])
        first(KEPT[4:])
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())["overlaps"]) == 5
