"""The transformers backend on one decoder layer at a time: the scores of the whole model."""

from pathlib import Path

import numpy as np
import pytest

from harness.backends.hf import HFBackend, open_checkpoint
from harness.checkpoints.apply_plan import apply_plan
from harness.contracts.plan import CompressionPlan
from harness.errors import WinnowError
from tests.harness.backends.test_hf_backend import texts
from tests.harness.checkpoints.compressed import merged, pruned
from tests.pretend import PretendGpus
from tests.tiny import ALL_FAMILIES, save_tiny

TEXTS = texts(7, seed=4)
PAIRS = [(context, " " + ending) for context in TEXTS[:4] for ending in TEXTS[4:]]
GROUPS = [[[0, 3], [1, 2, 5, 7], [4], [6]]] * 2


def opened(folder: Path, stream: bool | None, max_length: int | None = None, device: str = "cpu") -> HFBackend:
    return open_checkpoint(str(folder), "auto", device, 3, max_length, stream)


def assert_same(streamed: HFBackend, whole: HFBackend) -> None:
    """To the last bit, but where the whole model shares the cache of a context."""
    assert streamed.loglikelihood_rolling(TEXTS) == whole.loglikelihood_rolling(TEXTS)
    for ours, theirs in zip(streamed.token_logprobs(TEXTS, 5), whole.token_logprobs(TEXTS, 5), strict=True):
        for name, values in vars(theirs).items():
            np.testing.assert_array_equal(getattr(ours, name), values)
    distributions = (dict(one.distributions(PAIRS, 4)) for one in (streamed, whole))
    for ours, theirs in zip(*(sorted(found.items()) for found in distributions), strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_array_equal(ours[1].expected, theirs[1].expected)
        np.testing.assert_array_equal(ours[1].logprobs, theirs[1].logprobs)
    scored = streamed.loglikelihood(PAIRS)
    for ours, theirs in zip(scored, whole.loglikelihood(PAIRS), strict=True):
        assert ours.tokens == theirs.tokens and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    whole._shares_contexts = False
    assert scored == whole.loglikelihood(PAIRS)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_layer_by_layer_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    assert_same(opened(tmp_path, True), opened(tmp_path, None))


@pytest.mark.parametrize("plan", [merged(*GROUPS), pruned([0, 2, 5, 6, 7], [1, 2, 3])])
def test_compressed_models_too(plan: CompressionPlan, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    apply_plan(tmp_path / "model", plan, tmp_path / "out")
    assert_same(opened(tmp_path / "out", True, 60), opened(tmp_path / "out", False, 60))


def test_each_layer_is_read_once_and_gone_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    backend = opened(tmp_path, True)
    read: list[object] = []
    load = type(backend.model)._load
    monkeypatch.setattr(type(backend.model), "_load", lambda self, place: (read.append(place), load(self, place))[1])
    expected = backend.loglikelihood_rolling(TEXTS)
    assert read == [0, 1, "head"], "all batches go through a layer before the next is read"
    layers = backend.model.skeleton.base_model.layers
    assert all(weight.is_meta for weight in layers.parameters()) and backend.model.skeleton.lm_head.weight.is_meta
    read.clear()
    monkeypatch.setattr("harness.backends.scoring.KEPT", 1)
    assert backend.loglikelihood_rolling(TEXTS) == expected
    assert len(read) > 3 and read == [0, 1, "head"] * (len(read) // 3), "in turns, where hidden states do not fit"
    assert backend.loglikelihood([]) == []
    backend.close()


def test_on_a_gpu_all_that_computes_is_there(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    expected = opened(tmp_path, True).loglikelihood(PAIRS)
    with PretendGpus():
        found = opened(tmp_path, True, device="cuda:0").loglikelihood(PAIRS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_what_it_cannot_do_is_said_in_a_line(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    backend = opened(tmp_path, True)
    with pytest.raises(WinnowError, match=r"backend.stream=true scores texts but writes none.*stream=false"):
        backend.generate(["a"], 2)
    lm_eval = pytest.importorskip("harness.backends.lm_eval")
    with pytest.raises(WinnowError, match="backend.stream=false"):
        lm_eval.language_model(backend)
