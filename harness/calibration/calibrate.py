"""Calibration: one pass over a corpus that collects every statistic asked for, or their reuse."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.calibration.alignments import cached_aligner, device_for
from harness.calibration.cache import cached_statistics, content_key
from harness.calibration.collect import check_names, collect
from harness.calibration.collected import Collected, Part
from harness.calibration.routers import router_reader
from harness.calibration.shards import Shards
from harness.calibration.streamed import Model
from harness.calibration.tokens import TokenSequence, corpus_fingerprint
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader, router_rows_reader
from harness.checkpoints.fingerprint import model_fingerprint
from harness.contracts.statistics import STATISTICS, ExpertWeights, Statistics
from harness.families.table import family_of

log = logging.getLogger(__name__)


def calibrate(
    folder: Path,
    load_model: Callable[[], Model],
    sequences: Sequence[TokenSequence],
    statistics: frozenset[str],
    cache_dir: Path,
    batch_size: int = 8,
    dtype: str = "float32",
    corpus: str = "",
    fingerprint: str | None = None,
    shards: int | None = None,
    device: Any = "cpu",
) -> tuple[Statistics, Collected]:
    """Statistics of the checkpoint in ``folder`` on ``sequences``, by one pass or from the cache.

    ``load_model`` is called only where a pass is needed, and must give the model in ``dtype``; ``corpus`` is
    the name that the log shows; ``fingerprint`` is by default that of the folder's files. With ``shards`` there is no
    pass here: what ``calibrate_shard`` has made of that many parts is merged. Raises WinnowError where one is missing.
    ``device`` (as ``model.device``) is where channels are aligned if a method asks for it; the orders are kept beside
    the statistics.
    """
    family = family_of(read_config(folder))
    key = _key(folder, sequences, dtype, fingerprint)

    def compute(names: frozenset[str]) -> Collected:
        if shards is not None:
            return Shards(cache_dir, key, sequences, batch_size, shards).merged(statistics)
        known = names & STATISTICS.keys()  # an older cache may hold some that are gone
        return collect(load_model(), sequences, family, known, batch_size, corpus)

    collected = cached_statistics(cache_dir, key, check_names(statistics), compute)
    weights = expert_weights_reader(folder, family)
    orders = Path(cache_dir) / "alignments" / content_key({"model": key["model"]})
    statistics_read = replace(
        to_statistics(collected, weights),
        router=router_reader(folder, family),
        router_rows=router_rows_reader(folder, family),
        align=cached_aligner(orders, weights, device_for(device)),
    )
    return statistics_read, collected


def calibrate_shard(
    folder: Path,
    load_model: Callable[[], Model],
    sequences: Sequence[TokenSequence],
    statistics: frozenset[str],
    cache_dir: Path,
    shard: int,
    shards: int,
    batch_size: int = 8,
    dtype: str = "float32",
    corpus: str = "",
    fingerprint: str | None = None,
) -> Path | None:
    """One pass over part ``shard`` (from 0) of ``shards`` of the corpus: ``calibrate(..., shards=shards)`` merges them.

    ``sequences`` is the whole corpus. Returns the file of the partial statistics, which is not computed again while it
    is there; None where the corpus has too few batches to leave anything for this part. Raises WinnowError as
    ``collect`` does, where there is no such part, and where the file cannot be written.
    """
    family = family_of(read_config(folder))

    def compute(names: frozenset[str], some: Sequence[TokenSequence], part: Part) -> Collected:
        return collect(load_model(), some, family, names & STATISTICS.keys(), batch_size, corpus, part)

    of = Shards(cache_dir, _key(folder, sequences, dtype, fingerprint), sequences, batch_size, shards)
    return of.computed(shard, check_names(statistics), compute)


def _key(folder: Path, sequences: Sequence[TokenSequence], dtype: str, fingerprint: str | None) -> dict[str, str]:
    """What statistics are made from, by content."""
    return {"model": fingerprint or model_fingerprint(folder), "corpus": corpus_fingerprint(sequences), "dtype": dtype}


def to_statistics(collected: Collected, expert_weights: Callable[[int, int], ExpertWeights]) -> Statistics:
    return Statistics(
        num_experts=collected.num_experts,
        top_k=collected.top_k,
        tokens=collected.tokens,
        layers=collected.layers,
        n_group=collected.n_group,
        expert_weights=expert_weights,
    )
