"""One pass over a corpus that collects statistics, and which ones a run asks for."""

import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from harness.calibration.batches import sources_of
from harness.calibration.collected import AffineStep, Collected, Part
from harness.calibration.collectors.pairs import Usage
from harness.calibration.collectors.released import MovingAverage
from harness.calibration.collectors.table import collectors_for
from harness.calibration.drive import drive
from harness.calibration.recorder import Recorder
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import BY_ID, RELEASED, SAMPLED, STATISTICS
from harness.errors import WinnowError
from harness.families.family import Family

log = logging.getLogger(__name__)


def wanted_statistics(
    setting: str | Sequence[str], needed: frozenset[str], also: frozenset[str] = frozenset()
) -> frozenset[str]:
    """What ``calibration.statistics`` asks for: ``auto``, ``needed``, ``all`` or a list of names.

    ``needed`` is what the method declares; ``auto`` adds ``also``, what the other methods of the sweep declare, so that
    one pass serves them all; ``all`` adds everything but ``RELEASED``, ``SAMPLED`` and ``BY_ID``, each of which only one
    method reads; a list adds to what the method needs. Raises WinnowError for another setting and for an unknown name.
    """
    named = {"auto": also, "needed": frozenset(), "all": frozenset(STATISTICS) - RELEASED - SAMPLED - BY_ID}
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
    corpus: str = "",
    part: Part | None = None,
) -> Collected:
    """One pass of ``model`` over ``sequences`` for ``statistics`` (and ``frequency``) and nothing else.

    Sequences are batched by length, the longest first. ``part`` says which part of a larger corpus they are, where
    other passes see the rest (``harness.calibration.merge``). Raises WinnowError where they do not fit the model,
    and where anything turns NaN or infinite (naming layer and statistic). Experts that no token is routed to
    are counted in a warning; their sums are 0.
    """
    names = check_names(statistics)
    config = model.config.to_dict()
    sources = sources_of(sequences)
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    make = partial(collectors_for, names, len(sources), part or Part(0, tokens), config["vocab_size"])
    recorders = [
        Recorder(layer, family.router_output, make, sigmoid=family.sigmoid_router)
        for layer in family.moe_layers(config)
    ]
    over = f" over {corpus}" if corpus else ""
    log.info("calibration pass%s (%d sequences, %d tokens)", over, len(sequences), tokens)
    started = time.perf_counter()
    drive(model, family, sequences, recorders, batch_size, f"calibration{over}")
    layers = {recorder.layer: recorder.arrays for recorder in recorders}
    _warn_never_routed(layers)
    return Collected(
        num_experts=recorders[0].experts.num_experts,
        top_k=family.top_k(config),
        n_group=family.router_groups(config),
        sequences=len(sequences),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        layers=layers,
        usage=_usage(recorders, sources),
        part=part,
        steps={} if part is None else {recorder.layer: _steps(recorder) for recorder in recorders},
    )


def _usage(recorders: Sequence[Recorder], sources: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    counts = {
        str(recorder.layer): each.counts.tolist()
        for recorder in recorders
        for each in recorder.collectors
        if isinstance(each, Usage)
    }
    return {source: {layer: of[place] for layer, of in counts.items()} for place, source in enumerate(sources)}


def _steps(recorder: Recorder) -> dict[str, AffineStep]:
    return {each.name: each.affine for each in recorder.collectors if isinstance(each, MovingAverage)}


def _warn_never_routed(arrays: dict[int, dict[str, np.ndarray]]) -> None:
    unused = {layer: int((named["frequency"] == 0).sum()) for layer, named in arrays.items()}
    if any(unused.values()):
        total = sum(len(named["frequency"]) for named in arrays.values())
        where = ", ".join(f"{count} in layer {layer}" for layer, count in unused.items() if count)
        log.warning(
            "calibration: %d of %d experts were never routed to (%s); what is summed over their tokens is 0",
            sum(unused.values()), total, where,
        )  # fmt: skip
