"""One pass over a corpus that collects statistics."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from harness.calibration.batches import _batches
from harness.calibration.cache import Collected
from harness.calibration.drive import _check_fit, _forward
from harness.calibration.recorder import LayerRecorder, recording
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import RELEASED, SAMPLED, STATISTICS
from harness.errors import WinnowError
from harness.families.family import Family

log = logging.getLogger(__name__)


def wanted_statistics(
    setting: str | Sequence[str], needed: frozenset[str], also: frozenset[str] = frozenset()
) -> frozenset[str]:
    """What ``calibration.statistics`` asks for: ``auto``, ``needed``, ``all`` or a list of names.

    ``needed`` is what the method declares; ``auto`` adds ``also``, what the other methods of the sweep declare, so that
    one pass serves them all; ``all`` adds everything but ``RELEASED`` and ``SAMPLED``, each of which only one method
    reads; a list adds to what the method needs. Raises WinnowError for another setting and for an unknown name.
    """
    named = {"auto": also, "needed": frozenset(), "all": frozenset(STATISTICS) - RELEASED - SAMPLED}
    if isinstance(setting, str):
        if setting not in named:
            raise WinnowError(f"calibration.statistics must be {', '.join(named)} or a list of names, not '{setting}'")
        more = named[setting]
    else:
        more = check_names(frozenset(setting))
    return check_names(needed | more)


def check_names(names: frozenset[str]) -> frozenset[str]:
    """``names``; raises WinnowError where one of them is not a statistic."""
    unknown = sorted(names - STATISTICS.keys())
    if unknown:
        raise WinnowError(f"unknown statistic '{unknown[0]}'; known: {', '.join(STATISTICS)}")
    return names


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
