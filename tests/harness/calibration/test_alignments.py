"""Orders by float32 products, proven: those of ``align_channels``, also where nothing but the last digits decides."""

import itertools
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from harness.calibration import alignments
from harness.calibration.alignments import aligned, cached_aligner, device_for
from harness.calibration.assignment import proven_best
from harness.calibration.calibrate import calibrate
from harness.checkpoints.load import load_model
from harness.contracts.alignment import align_channels
from harness.contracts.statistics import ExpertWeights, Statistics, restricted
from harness.errors import WinnowError
from methods.m_smoe import MSMoE
from tests.harness.calibration.test_merge import corpus
from tests.tiny import save_tiny

CPU = torch.device("cpu")


def expert(rng: np.random.Generator, width: int, hidden: int, scale: float = 1.0, offset: float = 0.0) -> ExpertWeights:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return ExpertWeights(*(rng.normal(offset, scale, size).astype(np.float32) for size in shapes))


def shuffled(one: ExpertWeights, order: np.ndarray) -> ExpertWeights:
    return ExpertWeights(one.gate[order], one.up[order], one.down[:, order])


def rounded(one: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(torch.from_numpy(m).bfloat16().float().numpy() for m in (one.gate, one.up, one.down)))


class Fallbacks:
    """Counts the pairs whose float64 similarities were computed in full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0

        def counted(reference: ExpertWeights, member: ExpertWeights) -> tuple[int, ...]:
            self.count += 1
            return align_channels(reference, member)

        monkeypatch.setattr(alignments, "align_channels", counted)


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> Fallbacks:
    return Fallbacks(monkeypatch)


def orders(*experts: ExpertWeights) -> list[tuple[int, ...]]:
    """Of all experts, aligned to the first."""
    return aligned(experts.__getitem__, [(0, member) for member in range(1, len(experts))], CPU)


@pytest.mark.parametrize(("width", "hidden"), [(1, 3), (7, 4), (64, 96), (97, 200), (160, 300)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 400.0])
def test_random_experts_need_no_float64(width: int, hidden: int, scale: float, fallbacks: Fallbacks) -> None:
    rng = np.random.default_rng([width, hidden])
    some = [expert(rng, width, hidden, scale) for _ in range(4)]
    some += [rounded(one) for one in some]
    assert orders(*some) == [align_channels(some[0], other) for other in some[1:]]
    assert fallbacks.count == 0


def test_two_dominants_and_shuffles(fallbacks: Fallbacks) -> None:
    rng = np.random.default_rng(0)
    one, two = expert(rng, 48, 32), expert(rng, 48, 32)
    order = rng.permutation(48)
    some = [one, two, shuffled(one, order), shuffled(two, order)]
    pairs = [(0, 2), (1, 3), (1, 0), (0, 3)]
    found = aligned(some.__getitem__, pairs, CPU)
    assert found[0] == found[1] == tuple(np.argsort(order))
    assert found == [align_channels(some[a], some[b]) for a, b in pairs]
    assert fallbacks.count == 0


def near_tie(rng: np.random.Generator, gap: float, width: int = 24, hidden: int = 64) -> tuple[ExpertWeights, ...]:
    """A reference and a member with two channels that may change places at a loss of about ``gap`` (or a gain)."""
    one, other = expert(rng, width, hidden), expert(rng, width, hidden)
    a, b = rng.choice(width, 2, replace=False)
    for matrix in (other.gate, other.up):
        matrix[b] = matrix[a]
    other.down[:, b] = other.down[:, a]
    other.gate[b, 0] += np.float32(gap) * np.abs(other.gate[b, 0])
    return one, other


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1.2e-7, 0.0])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_near_ties_are_decided_in_float64(gap: float, offset: float, fallbacks: Fallbacks) -> None:
    pairs = 20
    for seed in range(pairs):
        one, other = near_tie(np.random.default_rng(seed), gap)
        one = ExpertWeights(one.gate + np.float32(offset), one.up, one.down)
        assert orders(one, other) == [align_channels(one, other)]
    if gap == 0.0:
        assert fallbacks.count == pairs  # equals: nothing can be proven
    elif gap >= 1e-4:
        assert fallbacks.count <= 1
    elif gap >= 1e-6:
        assert fallbacks.count < pairs  # those are left that float32 decides wrongly


def test_ties_that_float32_decides_wrongly(fallbacks: Fallbacks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product in float32 prefers another order, and so will have to be given up."""
    wrong = 0
    for seed in range(60):
        one, other = near_tie(np.random.default_rng(seed), 2.5e-7, width=12, hidden=2000)
        x, y = (alignments._channels(each, CPU) for each in (one, other))
        values = alignments._similarity(x, y[None])[0].numpy()
        best = align_channels(one, other)
        wrong += tuple(linear_sum_assignment(values, maximize=True)[1]) != best
        assert orders(one, other) == [best]
    assert 3 <= wrong <= fallbacks.count


@pytest.mark.parametrize("kind", ["zeros", "tiny", "huge", "beyond", "one row", "equal"])
def test_odd_weights(kind: str) -> None:
    rng = np.random.default_rng(5)
    one, other = expert(rng, 20, 12), expert(rng, 20, 12)
    if kind == "zeros":  # channels that are gone
        for each in (one, other):
            each.gate[3:8], each.up[3:8], each.down[:, 3:8] = 0.0, 0.0, 0.0
    scale = {"tiny": 1e-24, "huge": 1e15, "beyond": 1e25}.get(kind)  # beyond: products that float32 does not hold
    if scale:
        one, other = (
            ExpertWeights(*(m * np.float32(scale) for m in (each.gate, each.up, each.down))) for each in (one, other)
        )
    if kind == "one row":
        one.gate[4] *= 1e9
        one.up[5] *= 1e-9
    if kind == "equal":
        other = replace(other, gate=np.repeat(other.gate[:1], 20, 0), up=0 * other.up, down=0 * other.down)
    assert orders(one, other) == [align_channels(one, other)]


def test_no_answer_is_wrong_where_bounds_say_what_is_true() -> None:
    """Values moved by what the bounds allow: a proven order is the best of all, by trying all, and the only one."""
    proven = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        true = np.round(rng.normal(size=(5, 5)), 1 + seed % 3)
        bounds = rng.uniform(0, 10.0 ** -rng.integers(1, 6), size=(5, 5))
        seen = true + rng.uniform(-1, 1, size=(5, 5)) * bounds
        found = proven_best(seen, bounds, lambda i, j: true[i, j], 1e-12)  # noqa: B023
        sums = {p: true[range(5), p].sum() for p in itertools.permutations(range(5))}
        best = max(sums.values())
        if found is not None:
            assert [p for p, value in sums.items() if value > best - 1e-9] == [tuple(found)]
            proven += 1
    assert 30 <= proven < 300


def test_weights_that_are_not_finite_are_refused() -> None:
    rng = np.random.default_rng(1)
    one, broken = expert(rng, 6, 4), expert(rng, 6, 4)
    broken.up[2, 1] = np.nan
    with pytest.raises(WinnowError, match="weights are NaN or infinite"):
        orders(one, broken)


def test_memory_that_is_gone_sends_the_work_to_the_cpu(monkeypatch, caplog) -> None:
    rng = np.random.default_rng(1)
    one, other = expert(rng, 6, 4), expert(rng, 6, 4)
    channels, calls = alignments._channels, []

    def full(weights: ExpertWeights, device: torch.device) -> torch.Tensor:
        calls.append(device.type)
        if device.type == "meta":
            raise torch.OutOfMemoryError("no memory")
        return channels(weights, device)

    monkeypatch.setattr(alignments, "_channels", full)
    pairs = [(0, 1), (1, 0)]
    found = aligned([one, other].__getitem__, pairs, torch.device("meta"))
    assert found == [align_channels(one, other), align_channels(other, one)]
    assert calls == ["meta", "cpu", "cpu", "cpu", "cpu"] and caplog.text.count("aligned on the CPU") == 1


def test_several_batches_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    some = [expert(rng, 16, 8) for _ in range(6)]
    whole = orders(*some)
    monkeypatch.setattr(alignments, "_BYTES", 1)
    assert orders(*some) == whole


def test_precision_is_that_of_float32_and_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with alignments._full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_devices() -> None:
    assert device_for("cpu") == device_for("mps") == device_for({"": "cpu", "lm_head": "disk"}) == CPU
    assert device_for({"model.embed_tokens": "cpu", "model": 1, "lm_head": 0}) == torch.device("cuda:1")
    assert device_for("cuda:1") == torch.device("cuda:1") and device_for(2) == torch.device("cuda:2")
    assert device_for("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- kept orders ------------------------------------------------------------------------------------------------------


class Weights:
    """Experts of two layers, and which were read."""

    def __init__(self) -> None:
        rng = np.random.default_rng(8)
        self.all = {(layer, j): expert(rng, 10, 6) for layer in (1, 3) for j in range(5)}
        self.read: list[tuple[int, int]] = []

    def __call__(self, layer: int, j: int) -> ExpertWeights:
        self.read.append((layer, j))
        return self.all[layer, j]

    def order(self, layer: int, pair: tuple[int, int]) -> tuple[int, ...]:
        return align_channels(self.all[layer, pair[0]], self.all[layer, pair[1]])


def test_only_new_pairs_are_computed(tmp_path: Path) -> None:
    weights = Weights()
    align = cached_aligner(tmp_path / "a", weights, CPU)
    assert align(1, [(0, 1), (0, 2)]) == [weights.order(1, (0, 1)), weights.order(1, (0, 2))]
    assert weights.read == [(1, 0), (1, 1), (1, 2)]
    weights.read.clear()
    again = cached_aligner(tmp_path / "a", weights, CPU)
    assert again(1, [(0, 2), (4, 3), (0, 1)]) == [weights.order(1, pair) for pair in ((0, 2), (4, 3), (0, 1))]
    assert weights.read == [(1, 4), (1, 3)]
    assert again(3, [(0, 1)]) == [weights.order(3, (0, 1))] and again(3, []) == []
    assert cached_aligner(tmp_path / "b", weights, CPU)(1, [(0, 1)]) and weights.read[-2:] == [(1, 0), (1, 1)]


def test_a_damaged_file_is_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = Weights()
    align = cached_aligner(tmp_path, weights, CPU)
    expected = align(1, [(0, 1), (2, 3)])
    content = (tmp_path / "1.npz").read_bytes()
    for place in np.linspace(0, len(content) - 1, 40).astype(int):
        flipped = bytearray(content)
        flipped[place] ^= 2
        (tmp_path / "1.npz").write_bytes(bytes(flipped))
        assert align(1, [(0, 1), (2, 3)]) == expected
    assert "is damaged" in caplog.text
    (tmp_path / "1.npz").write_bytes(content[:100])
    (tmp_path / ".1.killed.tmp").write_bytes(b"half")
    weights.read.clear()
    assert align(1, [(2, 3)]) == expected[1:] and weights.read == [(1, 2), (1, 3)]
    assert not (tmp_path / ".1.killed.tmp").exists()


def test_several_at_once_lose_nothing(tmp_path: Path) -> None:
    weights = Weights()
    pairs = [pair for pair in itertools.permutations(range(5), 2)]
    threads = [
        threading.Thread(target=lambda some=some: cached_aligner(tmp_path, weights, CPU)(1, some))
        for some in (pairs[:8], pairs[4:12], pairs[8:], pairs[::2])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights.read.clear()
    found = cached_aligner(tmp_path, weights, CPU)(1, pairs)
    assert found == [weights.order(1, pair) for pair in pairs] and weights.read == []


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_second_ratio_and_corpus_reuse_the_orders(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", family)
    method = MSMoE("m_smoe")
    computed: list[int] = []

    def counted(weights, pairs, device, label=""):
        computed.append(len(pairs))
        return aligned(weights, pairs, device, label)

    monkeypatch.setattr(alignments, "aligned", counted)

    def decide(ratio: Fraction, seed: int) -> Statistics:
        some = corpus((40, 33), seed)
        sequences = [replace(each, lengths=(len(each.input_ids),), sources=each.sources[:1]) for each in some]
        statistics, _ = calibrate(
            tmp_path / "model", lambda: load_model(tmp_path / "model", "float32"), sequences, method.requires,
            tmp_path / "c",
        )  # fmt: skip
        plain = method.decide(replace(statistics, align=None), ratio, 0)
        assert method.decide(statistics, ratio, 0).plan == plain.plan
        return statistics

    decide(Fraction(1, 2), 0)
    assert sum(computed) == 8 and len(computed) == 2  # of two layers with 8 experts
    statistics = decide(Fraction(1, 2), 0)
    assert len(computed) == 2
    decide(Fraction(1, 2), 1)
    decide(Fraction(1, 4), 0)
    assert sum(computed) < 8 + 8 + 4  # some pairs are those of the first time
    few = restricted(statistics, {layer: [6, 1, 4] for layer in statistics.layers})
    assert few.align is not None and statistics.align is not None
    assert few.align(1, [(0, 2), (1, 0)]) == statistics.align(1, [(6, 4), (1, 6)])
