import pytest

from harness.contracts.record import Sample
from tasks.probes.degeneration import GenerationTask, loop_length, self_repetition


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("he said that " + "the old king and " * 5, 20),
        ("the old king and " * 4 + "the old", 18),
        ("so " * 16, 16),
        ("so " * 15, 0),
        ("a b c d e f " * 3, 0),
        ("zeros = [" + "0, " * 20, 40),
        ("zeros = [" + "0, " * 20 + "0]", 0),
        ("the old king and " * 6 + "then he slept", 0),
        (" ".join(map(str, range(21))) * 5, 0),
        ("", 0),
    ],
)
def test_a_loop_is_what_a_text_ends_in(text: str, length: int) -> None:
    assert loop_length(text) == length


def test_self_repetition_is_between_texts() -> None:
    assert self_repetition(["a b c d e", "x a b c d", "a b", ""]) == [0.5, 0.5, None, None]
    assert self_repetition(["a a a a a a a"]) == [0.0], "repeats within a text are not counted"


def written(**texts: list[str]) -> list[Sample]:
    return [Sample(task, f"{task}-{i}", 1.0, output=text) for task, own in texts.items() for i, text in enumerate(own)]


def test_scores_for_each_source_and_over_all() -> None:
    given = written(
        code=["return x", ""],
        writing=["one day a fox met a crow", "one day a fox ran", "ha " * 30],
        multiple_choice=["z"],
    )
    result = GenerationTask().run_on(given)
    scores = {(score.metric, score.part): score for score in result.scores}
    assert {domain for _, domain in scores} == {"", "code", "writing"}
    assert (scores["degenerate", ""].value, scores["degenerate", ""].n) == (0.2, 5)
    assert scores["degenerate", "writing"].value == pytest.approx(1 / 3) and scores["degenerate", "code"].value == 0
    assert scores["empty", "code"].value == 0.5 and scores["empty", ""].value == 0.2
    assert scores["length", "writing"].value == pytest.approx((7 + 5 + 30) / 3)
    assert scores["self_repetition", "writing"].value == pytest.approx((1 / 4 + 1 / 2 + 0) / 3)
    assert ("self_repetition", "code") not in scores, "neither has four words"
    assert not scores["degenerate", ""].higher_is_better and scores["length", ""].higher_is_better
    assert all(score.low <= score.value <= score.high for score in result.scores)
    assert [sample.score for sample in result.samples] == [0, 0, 0, 0, 1]
    assert result.samples[1].detail == {"words": 0, "loop": 0, "self_repetition": None}


def test_no_task_that_writes_gives_no_scores() -> None:
    result = GenerationTask().run_on(written(multiple_choice=["a b c d"]))
    assert result.scores == [] and result.samples == []
