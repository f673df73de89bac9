"""Divergences against scipy, closed forms, and the exact value where only the likeliest tokens are known."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy

from tasks.probes.divergence import MEASURES, divergences, truncated_divergences


def pair(positions: int = 40, vocabulary: int = 300, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    p = random.normal(scale=3.0, size=(positions, vocabulary))
    q = p + apart * random.normal(size=p.shape)
    return log_softmax(p, axis=1).astype(np.float32), log_softmax(q, axis=1).astype(np.float32)


def likeliest(logp: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-logp, axis=1)[:, :n]
    return ids, np.take_along_axis(logp, ids, axis=1)


def test_agrees_with_scipy() -> None:
    logp, logq = pair()
    found = divergences(logp, logq)
    p, q = (np.exp(one.astype(np.float64)) for one in (logp, logq))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert set(found) == set(MEASURES)
    assert found["js"] == pytest.approx(jensenshannon(p, q, axis=1) ** 2, rel=1e-9)
    assert found["kl_from_baseline"] == pytest.approx(rel_entr(p, q).sum(1), rel=1e-9)
    assert found["kl_to_baseline"] == pytest.approx(rel_entr(q, p).sum(1), rel=1e-9)
    assert found["tv"] == pytest.approx(np.abs(p - q).sum(1) / 2, rel=1e-9)
    assert found["esap"] == pytest.approx(np.minimum(p, q).sum(1), rel=1e-9)
    assert found["entropy"] == pytest.approx(entropy(q, axis=1), rel=1e-9)
    assert found["entropy_baseline"] == pytest.approx(entropy(p, axis=1), rel=1e-9)
    assert found["top1_agreement"].tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert not found["truncated_mass"].any()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = divergences(*pair())
    monkeypatch.setattr("tasks.probes.divergence.BLOCK", 7 * 300)
    for name, values in divergences(*pair()).items():
        assert values.tolist() == whole[name].tolist()


def test_closed_forms() -> None:
    half, sure = np.log([[0.5, 0.5]]), np.array([[0.0, -np.inf]])
    found = {name: float(value[0]) for name, value in divergences(half, sure).items()}
    assert found["tv"] == pytest.approx(0.5) and found["esap"] == pytest.approx(0.5)
    assert found["js"] == pytest.approx(0.75 * np.log(4 / 3))
    assert found["kl_to_baseline"] == pytest.approx(np.log(2))
    assert found["entropy"] == 0.0 and found["entropy_baseline"] == pytest.approx(np.log(2))
    assert found["kl_from_baseline"] == pytest.approx(5000, rel=1e-3), "a token ruled out counts as 10,000 nats away"
    apart = divergences([[0.0, -np.inf]], [[-np.inf, 0.0]])
    assert apart["js"][0] == pytest.approx(np.log(2)) and apart["tv"][0] == pytest.approx(1.0)


def test_a_model_against_itself_is_exactly_nothing() -> None:
    for logp in (pair(apart=0.0)[0], pair()[1], np.array([[0.0, -np.inf, -300.0]], dtype=np.float32)):
        for found in (divergences(logp, logp), truncated_divergences(*likeliest(logp, 2), *likeliest(logp, 2))):
            for name in ("js", "kl_from_baseline", "kl_to_baseline", "tv"):
                assert not found[name].any()
            assert (found["esap"] == 1).all() and (found["top1_agreement"] == 1).all()
            assert found["entropy"].tolist() == found["entropy_baseline"].tolist()


def test_finite_whatever_the_logits_but_not_where_they_are_nan() -> None:
    wild = np.array([[0.0, -1e30, 1e30, -np.inf], [-1e-30, 800.0, 0.0, -800.0]])
    assert all(np.isfinite(values).all() for values in divergences(wild, wild[::-1]).values())
    broken = divergences([[0.0, np.nan], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert np.isnan(broken["js"]).tolist() == [True, False]


@pytest.mark.parametrize("n", [3, 30, 300])
def test_truncation_error_is_within_its_bounds(n: int) -> None:
    logp, logq = pair(apart=2.0)
    exact = divergences(logp, logq)
    found = truncated_divergences(*likeliest(logp, n), *likeliest(logq, n))
    mass, rounding = found["truncated_mass"], 1e-6
    for name, most in (("js", np.log(2)), ("tv", 1.0)):
        assert (found[name] <= exact[name] + rounding).all()
        assert (exact[name] <= found[name] + most * mass + rounding).all()
    assert (exact["esap"] >= found["esap"] - mass - rounding).all()
    for name in ("kl_from_baseline", "kl_to_baseline", "entropy", "entropy_baseline"):
        assert (found[name] <= exact[name] + rounding).all()
    assert found["top1_agreement"].tolist() == exact["top1_agreement"].tolist()
    assert (mass.max() < 1e-6) if n == 300 else (mass.min() > 0)
    if n == 300:
        assert found["js"] == pytest.approx(exact["js"], abs=1e-5)


def test_truncated_by_hand() -> None:
    """Only token 7 is in both lists: distributions (0.6, 0.4) and (0.2, 0.8) over it and the rest."""
    found = truncated_divergences([[7, 1]], np.log([[0.6, 0.3]]), [[5, 7]], np.log([[0.5, 0.2]]))
    assert found["tv"][0] == pytest.approx(0.4) and found["truncated_mass"][0] == pytest.approx(0.6)
    assert found["entropy"][0] == pytest.approx(entropy([0.5, 0.2, 0.3]))
    assert found["top1_agreement"][0] == 0


def test_no_positions() -> None:
    assert all(values.shape == (0,) for values in divergences(np.zeros((0, 5)), np.zeros((0, 5))).values())
    none = np.zeros((0, 2))
    assert all(values.shape == (0,) for values in truncated_divergences(none, none, none, none).values())
