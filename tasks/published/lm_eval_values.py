"""What lm-eval's results hold, as values, intervals and samples of a record."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from harness.contracts import intervals
from harness.contracts.record import Sample

# Of metrics over a whole corpus, such as BLEU, which may take a second each.
CORPUS_RESAMPLES = 200


def metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def higher_is_better(results: Any, task: str, metric: str) -> bool:
    """What lm-eval says; true where it says nothing."""
    return results["higher_is_better"].get(task, {}).get(metric) is not False


def logprobs_of(row: Mapping[str, Any]) -> list[float]:
    """The log-likelihoods that the model answered a document's requests with; none where it wrote text."""
    answers = [of_request[0] for of_request in row["resps"]]
    return [float(a[0] if isinstance(a, tuple) else a) for a in answers if not isinstance(a, str)]


def is_perplexity(aggregate: Any) -> bool:
    from lm_eval.api import metrics

    return aggregate in (metrics.perplexity, metrics.weighted_perplexity, metrics.bits_per_byte)


def nll_of(aggregate: Callable[..., Any], value: Any) -> tuple[float, float] | None:
    """(negative log-likelihood, weight) of a document for lm-eval's perplexities, None for other metrics."""
    from lm_eval.api import metrics

    if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
        return -float(value[0]), float(value[1])
    return (-float(value), 1.0) if aggregate is metrics.perplexity else None


def interval_of(aggregate: Callable[..., Any], values: Sequence[Any], seed: int) -> intervals.Interval:
    """The 95 % interval of ``aggregate(values)``, a value a document."""
    from lm_eval.api import metrics

    if aggregate is metrics.mean:
        numbers = [float(value) for value in values]
        if set(numbers) <= {0.0, 1.0}:
            return intervals.wilson(sum(numbers), len(numbers))
        return intervals.bootstrap_mean(numbers, seed)
    pairs = [pair for value in values if (pair := nll_of(aggregate, value)) is not None]
    if pairs:
        nll, weights = zip(*pairs, strict=True)
        low, high = intervals.bootstrap_perplexity(nll, weights, seed)
        return (math.log2(low), math.log2(high)) if aggregate is metrics.bits_per_byte else (low, high)
    draws = np.random.default_rng(seed).integers(len(values), size=(CORPUS_RESAMPLES, len(values)))
    resampled = [float(aggregate([values[i] for i in draw])) for draw in draws]
    low, high = np.quantile(resampled, [(1 - intervals.CONFIDENCE) / 2, (1 + intervals.CONFIDENCE) / 2])
    return float(low), float(high)


def samples_of(name: str, task: str, rows: Sequence[Mapping[str, Any]], aggregation: Mapping[str, Any]) -> list[Sample]:
    """One sample a document; lm-eval has a row for each filter of it."""
    by_document = defaultdict(list)
    for row in rows:
        by_document[row["doc_id"]].append(row)
    seen: Counter[str] = Counter()
    samples = []
    for own in by_document.values():
        first = own[0]
        item = f"{task}-{first['doc_hash'][:16]}"
        seen[item] += 1
        score, weight = math.nan, 1.0  # nan: a metric over the corpus, such as BLEU
        if first["metrics"]:
            value = first[first["metrics"][0]]
            pair = nll_of(aggregation.get(first["metrics"][0], sum), value)
            if pair is not None:
                score, weight = pair
            elif not isinstance(value, tuple | list):
                score = float(value)
        target = first["target"]
        detail = {
            "metrics": {metric_name(metric, row["filter"]): row[metric] for row in own for metric in row["metrics"]},
            "logprobs": logprobs_of(first),
            "target": target if isinstance(target, str | int | float | list) else str(target),
        }
        written = [of_request[0] for of_request in first["resps"] if isinstance(of_request[0], str)]
        samples.append(
            Sample(
                name,
                item if seen[item] == 1 else f"{item}-{seen[item]}",
                score,
                weight,
                domain=task,
                output="\n".join(written),
                detail=detail,
            )
        )
    return samples
