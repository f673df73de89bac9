import pytest

from harness.contracts.record import Sample
from tasks.probes.diversity import DiversityTask, distinct, diversity, ngrams


def test_ngrams_over_words_and_marks() -> None:
    assert ngrams("x = f(x)", 2) == [("x", "="), ("=", "f"), ("f", "("), ("(", "x"), ("x", ")")]
    assert ngrams("one", 2) == [] and ngrams("", 1) == []


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [
        ("a b c d", 2, 1.0),
        ("a a a a", 2, 1 / 3),
        ("a b a b a", 2, 0.5),
        ("a b a b a", 4, 1.0),
        ("a b", 3, None),
    ],
)
def test_diversity_is_the_share_of_different_ngrams(text: str, n: int, value: float | None) -> None:
    assert diversity(text, n) == value


def test_distinct_counts_across_texts_and_leaves_each_out() -> None:
    found = distinct(["a b c", "a b d", "a b"], 2)
    assert found is not None
    value, left_out = found
    assert value == 3 / 5  # a b, b c, b d among five
    for i, rest in enumerate((["a b d", "a b"], ["a b c", "a b"], ["a b c", "a b d"])):
        assert left_out[i] == pytest.approx(distinct(rest, 2)[0])  # type: ignore[index]
    assert distinct(["a b", "x"], 2) is None


def samples(**texts: list[str]) -> list[Sample]:
    return [Sample(task, f"{task}-{i}", 1.0, output=text) for task, own in texts.items() for i, text in enumerate(own)]


def test_scores_for_each_source_and_over_all() -> None:
    given = samples(
        code=["a b a b a", "a b c d e"], math=["1 + 1 = 2", "1 + 1 = 2", ""], multiple_choice=["z z z z z z"]
    )
    result = DiversityTask().run_on(given)
    scores = {(score.metric, score.part): score for score in result.scores}
    assert scores["ngram_diversity_2", "code"].value == pytest.approx(0.75)
    assert scores["distinct_2", "math"].value == 0.5
    assert scores["ngram_diversity_2", ""].n == 4, "the empty text has no n-grams, multiple choice is not written"
    assert {domain for _, domain in scores} == {"", "code", "math"}
    assert all(0 <= score.low <= score.value <= score.high <= 1 for score in result.scores)
    assert [(s.item, s.domain) for s in result.samples][:2] == [("code-0", "code"), ("code-1", "code")]
    assert result.samples[0].detail == {"2": 0.5, "3": pytest.approx(2 / 3), "4": 1.0}


def test_a_model_that_repeats_itself_scores_lower() -> None:
    varied = samples(writing=["one day a fox met a crow", "the old king lost his ring"])
    stuck = samples(writing=["the the the the the the", "the the the the the the"])
    for ours, theirs in zip(DiversityTask().run_on(varied).scores, DiversityTask().run_on(stuck).scores, strict=True):
        assert ours.value == 1.0 and theirs.value <= 1 / 3


def test_nothing_written_gives_no_scores() -> None:
    result = DiversityTask().run_on(samples(code=["", "x"], multiple_choice=["a b c d"]))
    assert result.scores == [] and result.samples == []
