import math

import pytest

from harness.errors import WinnowError
from tasks.made.perplexity import DOMAINS, REAL, PerplexityTask, documents
from tests.tasks.scripted import ScriptedBackend


def words(text: str) -> int:
    return len(text.split()) - 1


def test_the_same_probability_for_every_token_is_its_inverse() -> None:
    result = PerplexityTask(items=5).run(ScriptedBackend(score=lambda c, t: -words(t) * math.log(3)))
    assert [score.part for score in result.scores] == ["", *DOMAINS]
    for score in result.scores:
        assert (score.value, score.low, score.high) == pytest.approx((3, 3, 3)) and not score.higher_is_better
    assert result.scores[0].n == sum(score.n for score in result.scores[1:]) == len(result.samples)
    assert len({sample.item for sample in result.samples}) == len(result.samples)


def test_overall_is_the_geometric_mean_of_the_domains_and_long_documents_weigh_more() -> None:
    result = PerplexityTask(items=5).run(ScriptedBackend(score=lambda c, t: -float(len(t))))
    overall, *domains = result.scores
    assert overall.value == pytest.approx(math.prod(score.value for score in domains) ** (1 / 5))
    for score in domains:
        own = [sample for sample in result.samples if sample.domain == score.part]
        assert score.value == pytest.approx(math.exp(sum(s.score for s in own) / sum(s.weight for s in own)))
        assert score.low <= score.value <= score.high and score.n == len(own)


def test_real_text_comes_from_both_kinds_and_all_over_the_held_out_files() -> None:
    few, more = documents(REAL, 10, 0), documents(REAL, 250, 0)
    assert len(few) == 2 and len(more) == 50 and len(set(more)) == 50
    code = [text for _, text in more if "def " in text or "import " in text or "self." in text]
    assert 15 <= len(code) <= 35
    everything = documents(REAL, 10**6, 0)
    assert {text for _, text in more} <= {text for _, text in everything} and len(everything) > 100


def test_documents_without_a_token_to_predict_do_not_count() -> None:
    backend = ScriptedBackend(score=lambda c, t: -1.0)
    original = backend.loglikelihood_rolling
    backend.loglikelihood_rolling = lambda texts, progress="": original(["x", *texts[1:]])  # type: ignore[method-assign]
    result = PerplexityTask(items=5, domains=("code",)).run(backend)
    assert [score.n for score in result.scores] == [4, 4]


def test_bad_domains_and_nan_are_errors() -> None:
    with pytest.raises(WinnowError, match="unknown text 'poems'; known: code"):
        PerplexityTask(items=5, domains=("poems",)).run(ScriptedBackend())
    with pytest.raises(WinnowError, match="not finite"):
        PerplexityTask(items=5).run(ScriptedBackend(score=lambda c, t: math.nan))
