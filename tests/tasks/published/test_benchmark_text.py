"""Perplexity of published text: a model whose tokens are all equally likely, by token, word and byte."""

import math
from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.published.text import TextBenchmark, detokenized
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

TEXTS = ["one two three four five", "six seven @-@ eight\n", " \n", "nine"]


def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def test_every_token_half_as_likely(tmp_path: Path) -> None:
    root = stage(tmp_path, "c4_sample", rows(TEXTS))
    backend = ScriptedBackend(score=lambda _, text: -math.log(2) * (len(text.split()) - 1))
    result = TextBenchmark("web", "c4_sample", root).run(backend)
    assert [(sample.item, sample.weight) for sample in result.samples] == [("0", 4.0), ("1", 3.0)]
    perplexity, words, bits = result.scores
    assert perplexity.metric == "perplexity" and perplexity.value == pytest.approx(2) and perplexity.n == 2
    # re.split counts what stands behind the last line break as a word, as lm-eval does
    assert words.metric == "word_perplexity" and words.value == pytest.approx(2 ** (7 / (5 + 5)))
    assert bits.metric == "bits_per_byte" and bits.value == pytest.approx(7 / (len(TEXTS[0]) + len(TEXTS[1])))
    assert all(score.low <= score.value <= score.high and not score.higher_is_better for score in result.scores)


def test_wikitext_is_undone_before_it_is_scored(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    page = "The well @-@ known band ( from Oslo ) sold 1 @,@ 000 records . \n"
    assert detokenized(page) == "The well-known band (from Oslo) sold 1,000 records.\n"
    seen: list[str] = []
    backend = ScriptedBackend(score=lambda _, text: seen.append(text) or -1.0)
    result = TextBenchmark("wikitext", "wikitext", stage(tmp_path, "wikitext", rows([page]))).run(backend)
    assert seen == [detokenized(page)]
    assert result.samples[0].detail == {"words": len(page.split()) + 1, "bytes": len(page.encode())}


def test_nothing_to_predict_and_nan_are_errors(tmp_path: Path) -> None:
    root = stage(tmp_path, "c4_sample", rows(TEXTS[2:]))
    with pytest.raises(WinnowError, match="no document"):
        TextBenchmark("web", "c4_sample", root).run(ScriptedBackend())
    root = stage(tmp_path / "b", "c4_sample", rows(TEXTS[:1]))
    with pytest.raises(WinnowError, match="not finite"):
        TextBenchmark("web", "c4_sample", root).run(ScriptedBackend(score=lambda *_: math.nan))
