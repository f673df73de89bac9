"""Calibration: one pass over a corpus that collects every statistic asked for, or their reuse."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from harness.calibration.cache import Collected, cached_statistics, model_fingerprint
from harness.calibration.recorder import BatchLayout, LayerRecorder, recording
from harness.calibration.routers import router_reader
from harness.checkpoints import skipping
from harness.checkpoints.reader import expert_weights_reader
from harness.contracts.statistics import RELEASED, SAMPLED, STATISTICS, ExpertWeights, Statistics
from harness.data.corpora import TokenSequence, corpus_fingerprint
from harness.errors import WinnowError
from harness.families.table import Family, family_of, read_config

log = logging.getLogger(__name__)


def calibrate(
    folder: Path,
    load_model: Callable[[], PreTrainedModel],
    sequences: Sequence[TokenSequence],
    statistics: frozenset[str],
    cache_dir: Path,
    batch_size: int = 8,
    dtype: str = "float32",
    corpus: str = "",
    progress: bool = True,
    fingerprint: str | None = None,
) -> tuple[Statistics, Collected]:
    """Statistics of the checkpoint in ``folder`` on ``sequences``, by one pass or from the cache.

    ``load_model`` is called only where a pass is needed, and must give the model in ``dtype``; ``corpus`` is
    the name that the log shows; ``fingerprint`` is by default that of the folder's files.
    """
    family = family_of(read_config(folder))
    key = {"model": fingerprint or model_fingerprint(folder), "corpus": corpus_fingerprint(sequences), "dtype": dtype}

    def compute(names: frozenset[str]) -> Collected:
        return collect(load_model(), sequences, family, names, batch_size, progress, corpus)

    collected = cached_statistics(cache_dir, key, check_names(statistics), compute)
    statistics_read = to_statistics(collected, expert_weights_reader(folder, family))
    return replace(statistics_read, router=router_reader(folder, family)), collected


def wanted_statistics(setting: str | Sequence[str], needed: frozenset[str]) -> frozenset[str]:
    """What ``calibration.statistics`` asks for: ``all``, ``needed`` (what the method declares) or a list.

    ``all`` lets every later method of a sweep reuse this pass (but for ``RELEASED`` and ``SAMPLED``, each of which only
    one method reads); a list adds to what the method needs.
    """
    if setting == "all":
        return (frozenset(STATISTICS) - RELEASED - SAMPLED) | check_names(needed)
    if setting == "needed":
        return check_names(needed)
    if isinstance(setting, str):
        raise WinnowError(f"calibration.statistics must be all, needed or a list of names, not '{setting}'")
    return check_names(frozenset(setting) | needed)


def check_names(names: frozenset[str]) -> frozenset[str]:
    """``names``; raises WinnowError where one of them is not a statistic."""
    unknown = sorted(names - STATISTICS.keys())
    if unknown:
        raise WinnowError(f"unknown statistic '{unknown[0]}'; known: {', '.join(STATISTICS)}")
    return names


def to_statistics(collected: Collected, expert_weights: Callable[[int, int], ExpertWeights]) -> Statistics:
    return Statistics(
        num_experts=collected.num_experts,
        top_k=collected.top_k,
        tokens=collected.tokens,
        layers=collected.layers,
        n_group=collected.n_group,
        expert_weights=expert_weights,
    )


def collect(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    family: Family,
    statistics: frozenset[str],
    batch_size: int = 8,
    progress: bool = True,
    corpus: str = "",
) -> Collected:
    """One pass of ``model`` over ``sequences`` for ``statistics`` (and ``frequency``) and nothing else.

    Sequences are batched by length, the longest first. Raises WinnowError where they do not fit the model,
    and where anything turns NaN or infinite (naming layer and statistic). Experts that no token is routed to
    are counted in a warning; their sums are 0.
    """
    _check_fit(model, sequences, family, batch_size)
    names = check_names(statistics)
    config = model.config.to_dict()
    layers = family.moe_layers(config)
    sources = sorted({source for sequence in sequences for source in sequence.sources})
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    name = f" over {corpus}" if corpus else ""
    log.info("calibration pass%s (%d sequences, %d tokens)", name, len(sequences), tokens)
    started = time.perf_counter()
    model.eval()
    bar = tqdm(total=tokens, unit="token", unit_scale=True, desc=f"calibration{name}", disable=not progress)
    with bar, torch.inference_mode(), recording(model, family, layers, names, len(sources), tokens) as recorders:
        for batch in _batches(sequences, sources, batch_size):
            for recorder in recorders:
                recorder.start_batch(batch.layout)
            _forward(model, batch)
            for recorder in recorders:
                recorder.check_finite()
            bar.update(batch.layout.tokens)
        arrays = {recorder.layer: recorder.arrays() for recorder in recorders}
    _warn_never_routed(arrays)
    return Collected(
        num_experts=recorders[0].num_experts,
        top_k=family.top_k(config),
        n_group=family.router_groups(config),
        sequences=len(sequences),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        layers=arrays,
        usage=_usage(recorders, sources),
    )


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor  # (B, L)
    attention_mask: Tensor | None  # (B, L), where there is padding and no packing
    position_ids: Tensor | None  # (B, L), where sequences are packed
    layout: BatchLayout


def _forward(model: PreTrainedModel, batch: _Batch) -> None:
    """The decoder alone: nobody reads the logits over the vocabulary, the largest tensor of all."""
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    model.base_model(
        input_ids=there(batch.input_ids),
        attention_mask=there(batch.attention_mask),
        position_ids=there(batch.position_ids),
        use_cache=False,
    )


def _batches(sequences: Sequence[TokenSequence], sources: Sequence[str], batch_size: int) -> Iterator[_Batch]:
    """Batches of similar lengths; the longest first, so that what does not fit in memory fails at once."""
    by_length = sorted(sequences, key=lambda sequence: -len(sequence.input_ids))
    for start in range(0, len(by_length), batch_size):
        yield _batch(by_length[start : start + batch_size], sources)


def _batch(sequences: Sequence[TokenSequence], sources: Sequence[str]) -> _Batch:
    length = max(len(sequence.input_ids) for sequence in sequences)
    shape = (len(sequences), length)
    input_ids = np.zeros(shape, dtype=np.int64)  # any token does for padding: nothing ever reads it
    position_ids = np.zeros(shape, dtype=np.int64)
    real = np.zeros(shape, dtype=bool)
    source = np.zeros(shape, dtype=np.int64)
    documents: list[tuple[int, int]] = []
    for row, sequence in enumerate(sequences):
        size = len(sequence.input_ids)
        input_ids[row, :size] = sequence.input_ids
        real[row, :size] = True
        position_ids[row, size:] = np.arange(length - size)
        start = 0
        for count, label in zip(sequence.lengths, sequence.sources, strict=True):
            position_ids[row, start : start + count] = np.arange(count)
            source[row, start : start + count] = sources.index(label)
            documents.append((row * length + start, row * length + start + count))
            start += count
    # Without an attention mask, transformers reads packed documents off the positions that start again, and
    # keeps attention inside each of them (for every attention implementation, sliding windows included).
    packed = any(len(sequence.lengths) > 1 for sequence in sequences)
    layout = BatchLayout(
        torch.from_numpy(real).reshape(-1),
        tuple(documents),
        torch.from_numpy(source).reshape(-1),
        int(real.sum()),
    )
    return _Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if packed or real.all() else torch.from_numpy(real).long(),
        position_ids=torch.from_numpy(position_ids) if packed else None,
        layout=layout,
    )


def gate_ratio_counts(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    family: Family,
    batch_size: int = 8,
    progress: bool = True,
    corpus: str = "",
) -> dict[int, np.ndarray]:
    """Layer -> (BINS,): the gate values of the tokens relative to their largest (``skipping.count_ratios``).

    One pass. ``model`` may be compressed; raises WinnowError as ``collect`` does where the sequences do not fit it.
    """
    _check_fit(model, sequences, family, batch_size)
    gates_at = family.router_output.index("gates")
    counts = {layer: np.zeros(skipping.BINS, dtype=np.int64) for layer in family.moe_layers(model.config.to_dict())}
    real = torch.zeros(0, dtype=torch.bool)

    def count(layer: int, module: torch.nn.Module, args: Any, output: Any) -> None:
        gates = output[gates_at]
        counts[layer] += skipping.count_ratios(gates[real.to(gates.device)]).cpu().numpy()

    name = f"gate values{f' over {corpus}' if corpus else ''}"
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    bar = tqdm(total=tokens, unit="token", unit_scale=True, desc=name, disable=not progress)
    model.eval()
    with ExitStack() as stack, bar, torch.inference_mode():
        for layer in counts:
            router = model.get_submodule(family.block.format(layer=layer)).get_submodule(family.router)
            stack.callback(router.register_forward_hook(partial(count, layer)).remove)
        for batch in _batches(sequences, sorted({s for sequence in sequences for s in sequence.sources}), batch_size):
            real = batch.layout.real
            _forward(model, batch)
            bar.update(batch.layout.tokens)
    return counts


def _check_fit(model: PreTrainedModel, sequences: Sequence[TokenSequence], family: Family, batch_size: int) -> None:
    if not family.separates_packed and any(len(sequence.lengths) > 1 for sequence in sequences):
        raise WinnowError(f"calibration.packing: a {family.model_type} model mixes packed documents; set it to false")
    if batch_size < 1:
        raise WinnowError(f"calibration.batch_size must be at least 1, not {batch_size}")
    if not sequences:
        raise WinnowError("the calibration corpus is empty: it has no token sequences")
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    largest = max(int(sequence.input_ids.max()) for sequence in sequences)
    if largest >= vocabulary:
        raise WinnowError(
            f"calibration: token {largest} is outside the model's vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model"
        )
    longest = max(max(sequence.lengths) for sequence in sequences)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise WinnowError(
            f"calibration: a document of {longest} tokens is longer than the model's {limit} positions: "
            f"set calibration.max_length={limit}"
        )


def _usage(recorders: Sequence[LayerRecorder], sources: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    return {
        source: {str(recorder.layer): recorder.usage[index].tolist() for recorder in recorders}
        for index, source in enumerate(sources)
    }


def _warn_never_routed(arrays: dict[int, dict[str, Any]]) -> None:
    unused = {layer: int((named["frequency"] == 0).sum()) for layer, named in arrays.items()}
    if any(unused.values()):
        total = sum(len(named["frequency"]) for named in arrays.values())
        where = ", ".join(f"{count} in layer {layer}" for layer, count in unused.items() if count)
        log.warning(
            "calibration: %d of %d experts were never routed to (%s); what is summed over their tokens is 0",
            sum(unused.values()), total, where,
        )  # fmt: skip
