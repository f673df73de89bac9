"""Drift of tiny models, against their logits taken one text at a time, and of texts that part where a test says so."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from transformers import PreTrainedModel

from harness.backends.hf import HFBackend
from harness.contracts.backend import Distributions
from harness.contracts.record import Sample, Score
from harness.errors import BrokenModel, WinnowError
from tasks.probes.divergence import MEASURES
from tasks.probes.drift import DriftTask, Pair, choose, parting, spans
from tests.tiny import byte_tokenizer, tiny_model

PROMPTS = ["def f(x):", "Tom has 3 apples.", "One day", "The mill", "x ="]
WRITTEN = [" return x", " He buys 4 more, which makes 7.", " a fox met a crow", " stood by the river for years", " 1"]


def samples(texts: Sequence[str], task: str = "writing") -> list[Sample]:
    return [
        Sample(task, f"{task}-{i}", 1.0, output=text, prompt=prompt)
        for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=False))
    ]


def backend(seed: int = 0, batch_size: int = 2) -> HFBackend:
    return HFBackend(tiny_model("qwen3_moe", seed=seed), byte_tokenizer(), batch_size=batch_size)


def drift(
    task: DriftTask, ours: HFBackend, base: HFBackend, written: Sequence[str] = WRITTEN, own: Sequence[str] = WRITTEN
) -> tuple[dict[tuple[str, str], Score], list[Sample]]:
    result = task.compare(task.observe(ours, samples(own), samples(written)), base)
    scores = {(score.metric, score.part): score for score in result.scores}
    assert len(scores) == len(result.scores)
    return scores, result.samples


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def logprobs(model: PreTrainedModel, prompt: str, text: str) -> np.ndarray:
    """(bytes of the text, vocabulary)"""
    tokens = ids(prompt + text)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].numpy()


def test_a_model_against_itself_drifts_by_exactly_nothing() -> None:
    task = DriftTask(positions=16)
    scores, found = drift(task, backend(), backend())
    for name in ("js", "kl_from_baseline", "kl_to_baseline", "tv", "truncated_mass"):
        of_measure = [score for (metric, _), score in scores.items() if metric.removeprefix("free_") == name]
        assert len(of_measure) >= 12 and {(s.value, s.low, s.high) for s in of_measure} == {(0.0, 0.0, 0.0)}
    for name in ("esap", "top1_agreement", "same_text"):
        assert scores[name, ""].value == 1.0
    assert ("parting_position", "") not in scores
    assert all(sample.score == 0.0 and not any(sample.detail["js"]) for sample in found)
    itself = task.compare(task.observe(backend(), samples(WRITTEN), None), backend())
    assert [s for s in itself.scores if s.metric == "js"] == [s for (m, _), s in scores.items() if m == "js"]


def test_every_position_is_what_one_text_at_a_time_gives() -> None:
    ours, base = backend(1), backend(0)
    own = [WRITTEN[0], " He sold 4 of them.", "", WRITTEN[3], " 12"]
    scores, found = drift(DriftTask(positions=16), ours, base, own=own)
    nll = []
    for sample, prompt, text, mine in zip(found, PROMPTS, WRITTEN, own, strict=True):
        q, p = (np.exp(logprobs(one.model, prompt, text)[:16]) for one in (ours, base))
        js = jensenshannon(p, q, axis=1) ** 2
        assert sample.detail["js"] == pytest.approx(js, rel=2e-4)
        assert sample.score == pytest.approx(js.mean(), rel=1e-4)
        assert sample.detail["top1_agreement"] == (p.argmax(1) == q.argmax(1)).tolist()
        assert sample.detail["esap"] == pytest.approx(np.minimum(p, q).sum(1), rel=2e-4)
        at = logprobs(base.model, prompt, mine) if mine else np.zeros((0, 300))
        nll.append(-at[range(len(mine)), ids(mine)])
        assert sample.detail["cross_nll"] == pytest.approx(nll[-1], rel=2e-4)
    by_text = [np.array(sample.detail["js"]) for sample in found]
    assert scores["js", ""].value == pytest.approx(np.mean([js.mean() for js in by_text]), rel=1e-4)
    assert scores["js", ""].low < scores["js", ""].value < scores["js", ""].high
    third = scores["js", "position 3-4"]
    assert third.value == pytest.approx(np.mean([js[2:4].mean() for js in by_text if len(js) > 2]), rel=1e-4)
    assert third.n == 4, "the last text has two tokens"
    assert scores["js", "writing"].value == scores["js", ""].value
    every = np.concatenate(nll)
    assert scores["cross_perplexity", ""].value == pytest.approx(np.exp(every.mean()), rel=1e-4)
    assert scores["cross_perplexity", ""].n == 4, "the empty text has no tokens"
    start = np.concatenate([values[:4] for values in nll])
    assert scores["running_cross_perplexity", "position 1-4"].value == pytest.approx(np.exp(start.mean()), rel=1e-4)


def test_free_running_ends_where_the_texts_part() -> None:
    own = [WRITTEN[0], " He sells", " a fox", " stood by", ""]
    scores, found = drift(DriftTask(positions=16), backend(1), backend(0), own=own)
    partings = [10, 5, 7, 10, 1]  # the first is the same to its end; the last but two break off
    assert [sample.detail["parting"] for sample in found] == partings
    assert (scores["parting_position", ""].value, scores["parting_position", ""].n) == (6, 4)
    assert (scores["same_text", ""].value, scores["same_text", ""].n) == (0.2, 5)
    free = [np.mean(sample.detail["js"][:where]) for sample, where in zip(found, partings, strict=True)]
    assert scores["free_js", ""].value == pytest.approx(np.mean(free), rel=1e-4)
    assert scores["free_js", "position 5-8"].n == 4 and scores["free_js", "position 9-16"].n == 2
    assert scores["js", "position 5-8"].n == 4 and scores["js", "position 9-16"].n == 4


def test_batches_do_not_show() -> None:
    one, _ = drift(DriftTask(positions=8), backend(1, 1), backend(0, 1))
    other, _ = drift(DriftTask(positions=8), backend(1, 5), backend(0, 5))
    assert {key: score.value for key, score in one.items()} == pytest.approx(
        {key: score.value for key, score in other.items()}, rel=1e-4
    )


class Truncated(HFBackend):
    """Knows the likeliest ``n`` tokens of each place only, as vLLM does."""

    n = 200

    def distributions(
        self, pairs: Sequence[tuple[str, str]], positions: int, progress: str = ""
    ) -> Iterator[tuple[int, Distributions]]:
        for place, found in super().distributions(pairs, positions, progress):
            tokens = np.argsort(-found.expected, axis=1)[:, : self.n]
            likeliest = np.take_along_axis(found.expected, tokens, 1)
            yield place, replace(found, expected=likeliest, expected_tokens=tokens)


def test_of_the_likeliest_tokens_alone_drift_is_within_its_bounds() -> None:
    exact, _ = drift(DriftTask(), backend(1), backend(0))
    ours, base = (Truncated(tiny_model("qwen3_moe", seed=seed), byte_tokenizer()) for seed in (1, 0))
    found, _ = drift(DriftTask(), ours, base)
    mass = found["truncated_mass", ""].value
    assert 0.01 < mass < 0.5 and set(found) == set(exact)
    for name, most in (("js", np.log(2)), ("tv", 1.0)):
        assert found[name, ""].value < exact[name, ""].value < found[name, ""].value + most * mass
    assert found["top1_agreement", ""].value == exact["top1_agreement", ""].value
    assert found["cross_perplexity", ""].value == pytest.approx(exact["cross_perplexity", ""].value)


def test_empty_texts_are_left_out_and_counted() -> None:
    scores, found = drift(DriftTask(), backend(1), backend(0), written=["", " a b", "", "", ""], own=[""] * 5)
    assert scores["js", ""].n == 1 and [sample.item for sample in found] == ["writing-1"]
    assert scores["same_text", ""].value == 0.8 and scores["parting_position", ""].value == 1.0
    assert ("cross_perplexity", "") not in scores
    nothing, found = drift(DriftTask(), backend(1), backend(0), written=[""] * 5, own=[" a"] * 5)
    assert found == [] and nothing["same_text", ""].value == 0.0 and nothing["cross_perplexity", ""].n == 5
    assert {metric for metric, _ in nothing}.isdisjoint(MEASURES)


def test_logits_of_nan_are_a_broken_model() -> None:
    broken = backend(1)
    with torch.no_grad():
        broken.model.lm_head.weight[7] = float("nan")
    with pytest.raises(BrokenModel, match="writing writing-1 are not finite; check the weights"):
        DriftTask().observe(broken, samples(WRITTEN), samples(WRITTEN))
    task = DriftTask()
    with pytest.raises(BrokenModel, match="not finite"):
        task.compare(task.observe(backend(1), samples(WRITTEN), samples(WRITTEN)), broken)


@pytest.mark.parametrize("baseline", [[], [Sample("multiple_choice", "q", 1.0)]])
def test_nothing_to_compare_with(baseline: list[Sample]) -> None:
    with pytest.raises(WinnowError, match="no text of the uncompressed model"):
        DriftTask().observe(backend(), samples(WRITTEN), baseline)
    with pytest.raises(WinnowError, match="no text of the uncompressed model"):
        DriftTask(sources=("code",)).observe(backend(), samples(WRITTEN), samples(WRITTEN))


def test_settings_that_measure_nothing() -> None:
    with pytest.raises(WinnowError, match="texts=0"):
        DriftTask(texts=0)


def test_parting_spans_and_choice() -> None:
    assert [parting([1, 2, 3], other) for other in ([1, 2, 3], [1, 5, 3], [1, 2], [], [9])] == [4, 2, 3, 1, 1]
    assert parting([], []) == 1
    assert spans(64) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    assert spans(1) == [(0, 1)] and spans(6)[-1] == (4, 6)
    pairs = [Pair(task, f"{task}{i}", "", "", "") for task, count in (("a", 4), ("b", 2)) for i in range(count)]
    assert [pair.item for pair in choose(pairs, 5)] == ["a0", "b0", "a1", "b1", "a2"]
