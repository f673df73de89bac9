"""Perplexity of published text: WikiText-2 and C4, by token, by word and by byte."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from harness.contracts import intervals
from harness.contracts.backend import Backend, Reader, TokenCounter
from harness.contracts.record import Sample, Score
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.data.schema import Row
from harness.errors import WinnowError
from tasks.published.items import Benchmark
from tasks.scores import require_finite

# C4 is scored as lm-eval scores it too, with WikiText's marks undone where its text has them.
DETOKENIZED = ("wikitext", "c4")


def detokenized(text: str) -> str:
    """WikiText's text as it was written, by lm-evaluation-harness' own rules. Raises WinnowError without lm-eval."""
    try:
        from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    except ImportError as error:
        raise WinnowError(f'the text is undone by lm-eval ({error}): pip install "moe-winnow[eval]"') from error
    return str(wikitext_detokenizer({"page": text}))


@dataclass(frozen=True)
class TextBenchmark(Benchmark, ModelTask):
    """``perplexity`` a token, ``word_perplexity`` and ``bits_per_byte``; every one over all documents together.

    Documents are scored one by one in windows of the model's length (``loglikelihood_rolling``), WikiText and C4 after
    lm-eval's detokenizer; words and bytes are those of the text as published, as in lm-eval. One difference from it
    remains: where a tokenizer begins no text with a token of its own, a document's first token is not scored (lm-eval
    scores it behind the end-of-text token), a token in thousands.

    ``data_set``: any set of texts (wikitext, c4, c4_sample). A sample's score is the negative log-likelihood of a
    document in nats, its weight its number of scored tokens.
    """

    kind: ClassVar[str] = "perplexity"

    domain: str = "language"

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return Need(counter.longest(self._texts(counter, self._documents())))

    def run(self, backend: Backend) -> TaskResult:
        documents = self._documents()
        results = backend.loglikelihood_rolling(self._texts(backend, documents), f"{self.name}: scoring")
        require_finite(results, self.name)
        samples = []
        for row, result in zip(documents, results, strict=True):
            if result.tokens:
                detail = {"words": len(re.split(r"\s+", row["text"])), "bytes": len(row["text"].encode())}
                samples.append(Sample(self.name, row["id"], -result.logprob, float(result.tokens), detail=detail))
        if not samples:
            raise WinnowError(f"{self.name}: no document of {self.data_set} has a token to predict")
        tokens = self._score("perplexity", samples, [sample.weight for sample in samples])
        words = self._score("word_perplexity", samples, [float(sample.detail["words"]) for sample in samples])
        by = self._score("bits_per_byte", samples, [float(sample.detail["bytes"]) for sample in samples])
        bits = replace(by, value=math.log2(by.value), low=math.log2(by.low), high=math.log2(by.high))
        return TaskResult([tokens, words, bits], samples)

    def _documents(self) -> list[Row]:
        return [row for row in self.rows() if row["text"].strip()]

    def _texts(self, reader: Reader, documents: Sequence[Row]) -> list[str]:
        texts = [detokenized(row["text"]) if self.data_set in DETOKENIZED else row["text"] for row in documents]
        return [reader.prompt(text) for text in texts]

    def _score(self, metric: str, samples: list[Sample], weights: list[float]) -> Score:
        nll = [sample.score for sample in samples]
        low, high = intervals.bootstrap_perplexity(nll, weights, self.seed)
        value = intervals.perplexity(nll, weights)
        return Score(self.name, metric, value, len(samples), low, high, higher_is_better=False)
