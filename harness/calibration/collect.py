"""One pass over a corpus that collects statistics, and which ones a run asks for."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import numpy as np

from harness.calibration.batches import sources_of
from harness.calibration.collected import Collected, Part
from harness.calibration.collectors.table import collectors_for
from harness.calibration.drive import check_fit, drive
from harness.calibration.merge import joined
from harness.calibration.recorder import Recorder
from harness.calibration.streamed import Model, chunks
from harness.calibration.tokens import TokenSequence
from harness.calibration.unfinished import kept
from harness.contracts.statistics import BY_ID, NOVICES, RELEASED, SAMPLED, STATISTICS
from harness.errors import WinnowError
from harness.families.family import Family

log = logging.getLogger(__name__)


def wanted_statistics(
    setting: str | Sequence[str], needed: frozenset[str], also: frozenset[str] = frozenset()
) -> frozenset[str]:
    """What ``calibration.statistics`` asks for: ``auto``, ``needed``, ``all`` or a list of names.

    ``needed`` is what the method declares; ``auto`` adds ``also``, what the other methods of the sweep declare, so that
    one pass serves them all; ``all`` adds everything but ``RELEASED``, ``SAMPLED``, ``BY_ID`` and ``NOVICES``, each of
    which few methods read; a list adds to what the method needs. Raises WinnowError for another setting and for an
    unknown name.
    """
    everything = frozenset(STATISTICS) - RELEASED - SAMPLED - BY_ID - NOVICES
    named = {"auto": also, "needed": frozenset(), "all": everything}
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
    model: Model,
    sequences: Sequence[TokenSequence],
    family: Family,
    statistics: frozenset[str],
    batch_size: int = 8,
    corpus: str = "",
    part: Part | None = None,
) -> Collected:
    """One pass of ``model`` over ``sequences`` for ``statistics`` (and ``frequency``) and nothing else.

    Sequences are batched by length, the longest first. ``part`` says which part of a larger corpus they are, where
    other passes see the rest (``harness.calibration.merge``). Of a streamed model the hidden states of all sequences
    may not fit in memory; then they go through in parts, and the statistics are those of one pass to rounding.

    Raises WinnowError where the sequences do not fit the model, and where anything turns NaN or infinite (naming layer
    and statistic). Experts that no token is routed to are counted in a warning; their sums are 0.
    """
    names = check_names(statistics)
    check_fit(model, family, sequences, batch_size)
    over = f" over {corpus}" if corpus else ""
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    log.info("calibration pass%s (%d sequences, %d tokens)", over, len(sequences), tokens)
    whole = part or Part(0, tokens)
    found = chunks(model, sequences, batch_size)
    done: list[Collected] = []
    with kept(model, sequences, part, {"statistics": sorted(names), "batch_size": batch_size}) as folder:
        for number, (some, place) in enumerate(found, start=1):
            label = f"calibration{over}" + (f", part {number} of {len(found)}" if len(found) > 1 else "")
            at = Part(whole.offset + place.offset, whole.total)
            state = None if folder is None else folder / f"{at.offset}-{len(some)}"
            done.append(_pass(model, some, family, names, batch_size, label, at, state))
    result = reduce(joined, done)
    _warn_never_routed(result.layers)
    return result if part else replace(result, part=None, steps={})


def _pass(
    model: Model,
    sequences: Sequence[TokenSequence],
    family: Family,
    names: frozenset[str],
    batch_size: int,
    label: str,
    part: Part,
    state: Path | None,
) -> Collected:
    config = model.config.to_dict()
    sources = sources_of(sequences)
    make = partial(collectors_for, names, len(sources), part, config["vocab_size"])
    recorders = [
        Recorder(layer, family.router_output, make, sigmoid=family.sigmoid_router)
        for layer in family.moe_layers(config)
    ]
    started = time.perf_counter()
    drive(model, family, sequences, recorders, batch_size, label, state)
    return Collected(
        num_experts=len(recorders[0].arrays["frequency"]),
        top_k=family.top_k(config),
        n_group=family.router_groups(config),
        sequences=len(sequences),
        tokens=sum(len(sequence.input_ids) for sequence in sequences),
        seconds=time.perf_counter() - started,
        layers={recorder.layer: recorder.arrays for recorder in recorders},
        usage={
            source: {str(recorder.layer): recorder.usage[place].tolist() for recorder in recorders}
            for place, source in enumerate(sources)
        },
        part=part,
        steps={recorder.layer: recorder.steps for recorder in recorders},
    )


def _warn_never_routed(arrays: dict[int, dict[str, np.ndarray]]) -> None:
    unused = {layer: int((named["frequency"] == 0).sum()) for layer, named in arrays.items()}
    if any(unused.values()):
        total = sum(len(named["frequency"]) for named in arrays.values())
        where = ", ".join(f"{count} in layer {layer}" for layer, count in unused.items() if count)
        log.warning(
            "calibration: %d of %d experts were never routed to (%s); what is summed over their tokens is 0",
            sum(unused.values()), total, where,
        )  # fmt: skip
