"""A small sweep whose numbers are known: in every cell the first so many items of a task are right."""

from pathlib import Path

import numpy as np

from harness.contracts.intervals import bootstrap_mean, bootstrap_perplexity, wilson
from harness.contracts.record import Record, Sample, Score
from harness.records.identity import cell_id
from harness.records.store import RecordStore
from tests.kinds import with_kinds

ITEMS = {"code": 40, "math": 40, "writing": 20}
QUESTIONS = 25  # a domain
TEXTS = 8  # a domain
CHOICE_DOMAINS = ("knowledge", "code", "math", "writing")
TEXT_DOMAINS = ("code", "math", "writing", "knowledge", "real_text")
BASELINE = {"code": 36, "math": 32, "writing": 18, "choice": 20, "perplexity": 4.0}
BASELINE_EXPERT_PARAMETERS = 8_000_000
BASELINE_BYTES = 20_000_000

# method -> ratio -> right answers, and the perplexity; on the corpus "mixed", seed 0
RIGHT = {
    "reap": {0.25: {"code": 34, "math": 28, "writing": 17, "choice": 19, "perplexity": 4.4},
             0.5: {"code": 24, "math": 18, "writing": 14, "choice": 16, "perplexity": 6.0}},
    "frequency": {0.25: {"code": 28, "math": 20, "writing": 16, "choice": 17, "perplexity": 5.0},
                  0.5: {"code": 12, "math": 6, "writing": 10, "choice": 12, "perplexity": 9.0}},
    "hc_smoe": {0.25: {"code": 30, "math": 24, "writing": 17, "choice": 19, "perplexity": 4.6},
                0.5: {"code": 20, "math": 10, "writing": 12, "choice": 14, "perplexity": 7.0}},
}  # fmt: skip
RANDOM = {  # ratio -> one cell a seed
    0.25: [
        {"code": 20, "math": 12, "writing": 14, "choice": 14, "perplexity": 7.0},
        {"code": 24, "math": 16, "writing": 15, "choice": 15, "perplexity": 6.0},
        {"code": 16, "math": 8, "writing": 13, "choice": 13, "perplexity": 8.0},
    ],
    0.5: [
        {"code": 4, "math": 0, "writing": 6, "choice": 8, "perplexity": 30.0},
        {"code": 2, "math": 0, "writing": 5, "choice": 8, "perplexity": 40.0},
        {"code": 6, "math": 0, "writing": 4, "choice": 8, "perplexity": 1234.5},
    ],
}


def make_samples(right: dict[str, float]) -> list[Sample]:
    samples = [
        Sample(task, f"{task}-{i:03}", float(i < right[task]), output=f"answer {i}")
        for task, count in ITEMS.items()
        for i in range(count)
    ]
    samples += [
        Sample("multiple_choice", f"{domain}-{i:03}", float(i < right["choice"]), domain=domain)
        for domain in CHOICE_DOMAINS
        for i in range(QUESTIONS)
    ]
    # Document i has 10 + i tokens, harder and easier ones in turn, so that the corpus has the wanted
    # perplexity.
    tokens = 10.0 + np.arange(TEXTS)
    swing = np.where(np.arange(TEXTS) % 2, 0.5, -0.5) / tokens
    nll = tokens * (np.log(right["perplexity"]) + swing)
    nll -= (nll.sum() - tokens.sum() * np.log(right["perplexity"])) / TEXTS
    return samples + [
        Sample("perplexity", f"{domain}-{i}", float(nll[i]), weight=float(tokens[i]), domain=domain)
        for domain in TEXT_DOMAINS
        for i in range(TEXTS)
    ]


def make_scores(samples: list[Sample], diversity: float) -> list[Score]:
    def of(task: str, domain: str = "") -> list[Sample]:
        return [s for s in samples if s.task == task and domain in ("", s.domain)]

    scores = []
    for task, metric, domains in (
        ("code", "pass@1", ("",)),
        ("math", "exact_match", ("",)),
        ("multiple_choice", "acc", ("", *CHOICE_DOMAINS)),
    ):
        for domain in domains:
            outcomes = [s.score for s in of(task, domain)]
            n = len(outcomes)
            scores.append(Score(task, metric, sum(outcomes) / n, n, *wilson(sum(outcomes), n), part=domain))
    writing = [s.score for s in of("writing")]
    share = float(np.mean(writing))
    scores.append(Score("writing", "elements", share, len(writing), *bootstrap_mean(writing)))
    for domain in ("", *TEXT_DOMAINS):
        nll, tokens = np.array([(s.score, s.weight) for s in of("perplexity", domain)]).T
        value = float(np.exp(nll.sum() / tokens.sum()))
        low, high = bootstrap_perplexity(nll, tokens)
        scores.append(Score("perplexity", "perplexity", value, len(nll), low, high, domain, higher_is_better=False))
    scores.append(Score("diversity", "ngram_diversity_3", diversity, 20, diversity - 0.03, diversity + 0.03))
    return with_kinds(scores)


def make_cell(
    method: str, ratio: float, corpus: str, seed: int, right: dict[str, float], settings: dict | None = None
) -> tuple[Record, list[Sample]]:
    cell = {
        "model": "tiny",
        "method": method,
        "ratio": ratio,
        "calibration": corpus,
        "seed": seed,
        "suite": "reference",
        "backend": "hf",
    }
    """``settings`` go into the configuration, over what is there by default."""
    config = {"method": {"name": method}, "suite": {"name": "reference"}, "seed": seed} | (settings or {})
    samples = make_samples(right)
    record = Record(
        cell={"id": cell_id(cell, config), **cell},
        config=config,
        versions={"winnow": "0"},
        fingerprints={"model": "abc"},
        scores=make_scores(samples, diversity=0.8 if method == "none" else 0.7),
        sizes={
            "weights_bytes": int(BASELINE_BYTES * (1 - 0.8 * ratio)),
            "parameters": int(10_000_000 - ratio * BASELINE_EXPERT_PARAMETERS),
            "expert_parameters": int(BASELINE_EXPERT_PARAMETERS * (1 - ratio)),
            "expert_bytes": int(2 * BASELINE_EXPERT_PARAMETERS * (1 - ratio)),
            "baseline_weights_bytes": BASELINE_BYTES,
            "baseline_parameters": 10_000_000,
            "baseline_expert_parameters": BASELINE_EXPERT_PARAMETERS,
            "baseline_expert_bytes": 2 * BASELINE_EXPERT_PARAMETERS,
        },
        timings={"calibration": 3.0, "evaluation": 20.0 + seed},
        expert_usage={} if method == "none" else {corpus: make_usage(corpus)},
    )
    return record, samples


def make_usage(corpus: str, layers: int = 4, experts: int = 16) -> dict[str, list[int]]:
    """Counts that fall from expert to expert; each corpus begins at another expert."""
    first = {"mixed": 0, "code": 0, "math": 8}.get(corpus, 4)
    counts = (1000 * 0.8 ** np.arange(experts)).astype(int)
    return {str(layer): np.roll(counts, first + layer).tolist() for layer in range(layers)}


def write_sweep(
    folder: Path,
    corpora: tuple[str, ...] = ("mixed",),
    samples: bool = True,
    methods: tuple[str, ...] = (*RIGHT, "random"),
) -> None:
    """The sweep on each corpus: off "mixed", code and math lose what the corpus does not speak of."""
    store, baselines = RecordStore(folder), RecordStore(folder, "baseline")
    baselines.write(*make_cell("none", 0.0, "none", 0, BASELINE))
    for corpus in corpora:
        for method in (name for name in RIGHT if name in methods):
            for ratio, right in RIGHT[method].items():
                lost = {"code": {"math": 6}, "math": {"code": 12}}.get(corpus, {})
                here = {name: max(0, value - lost.get(name, 0)) for name, value in right.items()}
                store.write(*make_cell(method, ratio, corpus, 0, here))
        for ratio, seeds in RANDOM.items() if "random" in methods else ():
            for seed, right in enumerate(seeds):
                store.write(*make_cell("random", ratio, corpus, seed, right))
    if not samples:
        for path in folder.rglob("*.parquet"):
            path.unlink()
