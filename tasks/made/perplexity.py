"""Token perplexity of text that was held out: four made domains and one that people wrote."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from typing import ClassVar

import numpy as np

from harness.contracts import intervals
from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample, Score
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.errors import WinnowError
from tasks.reference import real_text
from tasks.reference.items import GENERATORS, evaluation_problems
from tasks.scores import require_finite

REAL = "real_text"
DOMAINS = (*GENERATORS, REAL)
# A piece of real text is several times as long as a made document; this many fewer hold about as many tokens.
REAL_SHARE = 5


@lru_cache(maxsize=32)
def documents(domain: str, items: int, seed: int) -> tuple[tuple[str, str], ...]:
    """(item, text) of a domain: ``items`` made documents, or a fifth as many pieces of real text.

    Real text is Python source and prose in turn, from the held-out files, spread evenly over them.
    """
    if domain != REAL:
        return tuple((problem.id, problem.text) for problem in evaluation_problems(domain, items, seed))
    wanted = max(2, items // REAL_SHARE)
    kinds = [_spread(real_text.held_out_documents(kind, "evaluation"), (wanted + 1) // 2) for kind in real_text.KINDS]
    texts = [text for text in chain.from_iterable(zip_longest(*kinds)) if text is not None][:wanted]
    return tuple((f"{REAL}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text) for text in texts)


def _spread(texts: list[str], count: int) -> list[str]:
    """``count`` of the texts (or all there are) at even distances."""
    return [texts[i * len(texts) // count] for i in range(count)] if count < len(texts) else texts


@dataclass(frozen=True)
class PerplexityTask(ModelTask):
    """Perplexity a token for each domain: ``exp`` of the mean negative log-likelihood over its tokens.

    The first token of a document, before which nothing stands, is not scored. The score over all domains is
    the geometric mean of theirs, so that each counts the same. A sample's score is the negative
    log-likelihood of a document in nats, its weight the number of its scored tokens. ``items`` is the number
    of documents a domain (a fifth as many pieces of real text, see ``documents``).
    """

    kind: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 1

    items: int = 250
    seed: int = 0
    domains: tuple[str, ...] = DOMAINS
    name: str = "perplexity"
    domain: str = "language"

    def items_content(self) -> tuple[tuple[str, str], ...] | None:
        """The real text, which is that of Python's own library; the rest is made."""
        return documents("real_text", self.items, self.seed) if "real_text" in self.domains else None

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return Need(counter.longest([text for *_, text in self._texts()]))

    def run(self, backend: Backend) -> TaskResult:
        texts = self._texts()
        results = backend.loglikelihood_rolling([text for *_, text in texts], progress=f"{self.name}: scoring")
        require_finite(results, self.name)
        # A document of one token has nothing to predict.
        samples = [
            Sample(self.name, item, -result.logprob, float(result.tokens), domain)
            for (domain, item, _), result in zip(texts, results, strict=True)
            if result.tokens
        ]
        by_domain = {
            domain: (
                [sample.score for sample in samples if sample.domain == domain],
                [sample.weight for sample in samples if sample.domain == domain],
            )
            for domain in self.domains
        }
        return TaskResult([self._overall(by_domain), *(self._score(d, *v) for d, v in by_domain.items())], samples)

    def _texts(self) -> list[tuple[str, str, str]]:
        """(domain, item, text) of every document. Raises WinnowError for a domain that is unknown."""
        unknown = set(self.domains) - set(DOMAINS)
        if unknown or not self.domains:
            raise WinnowError(f"unknown text {', '.join(sorted(unknown))!r}; known: {', '.join(DOMAINS)}")
        return [(domain, *item) for domain in self.domains for item in documents(domain, self.items, self.seed)]

    def _score(self, domain: str, nll: list[float], tokens: list[float]) -> Score:
        low, high = intervals.bootstrap_perplexity(nll, tokens, self.seed)
        value = intervals.perplexity(nll, tokens)
        return Score(self.name, "perplexity", value, len(nll), low, high, domain, higher_is_better=False)

    def _overall(self, by_domain: dict[str, tuple[list[float], list[float]]]) -> Score:
        low, high = intervals.bootstrap_geometric_mean(by_domain, self.seed)
        logs = [np.log(intervals.perplexity(*values)) for values in by_domain.values()]
        n = sum(len(nll) for nll, _ in by_domain.values())
        value = float(np.exp(np.mean(logs)))
        return Score(self.name, "perplexity", value, n, low, high, higher_is_better=False)
