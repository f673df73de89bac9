"""The pass of a refit: the intact model, one layer at a time, each refitted while its weights are there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.calibration.drive import drive
from harness.calibration.overlap import spaced
from harness.calibration.streamed import StreamedModel, chunks
from harness.calibration.tokens import TokenSequence
from harness.calibration.unfinished import kept
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.plan import CompressionPlan
from harness.contracts.plan_files import plan_fingerprint
from harness.contracts.recovery import Fit
from harness.errors import WinnowError
from harness.refit.watch import CALIBRATION, HELD_OUT, RefitWatch


@dataclass(frozen=True)
class Refitted:
    """``told`` for the record: fits, tokens, and of each layer the relative squared errors of its output, before the
    first fit and behind each, on the text that was fitted to and (None without any) on held-out text."""

    plan: CompressionPlan
    told: dict[str, Any]


def refit(
    model: StreamedModel,
    plan: CompressionPlan,
    fits: Sequence[Fit],
    sequences: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence] = (),
    batch_size: int = 8,
    all_tokens: int | None = None,
) -> Refitted:
    """``plan`` with the down projections of its experts fitted to what the intact ``model`` computes on ``sequences``.

    One pass. Killed, it goes on behind the last layer (``harness.calibration.unfinished``). Raises WinnowError where
    the text does not fit the model or the memory, and where sums are not finite or singular.
    """
    family = model.model.family
    text = marked(within(sequences, max(fit.tokens for fit in fits)), held_out)
    check_memory(model, text, batch_size, 2)
    config = model.config.to_dict()
    rows = min(sum(new is not None for new in layer.route) for layer in plan.layers)
    reader = CheckpointReader(model.model.folder)
    stored = reader.tensor(family.expert_tensors[0].names(plan.layers[0].layer, 1)[0]).dtype
    top_k = min(family.top_k(config), rows)
    watches = [RefitWatch(layer, fits, family, top_k, stored, all_tokens) for layer in plan.layers]
    what = {"plan": plan_fingerprint(plan), "fits": [repr(fit) for fit in fits], "all_tokens": all_tokens}
    with kept(model, text, None, {"refit": what, "batch_size": batch_size}) as state:
        drive(model, family, text, watches, batch_size, "refit", state)
    found = [watch.fitted for watch in watches if watch.fitted is not None]
    layers = {str(each.plan.layer): {"calibration": each.calibration, "heldout": each.heldout} for each in found}
    told = {
        "fits": [{"objective": fit.name, "alpha": fit.alpha} for fit in fits],
        **counted(text),
        **({"all_tokens": all_tokens} if all_tokens and any(fit.name == "all_tokens" for fit in fits) else {}),
        "layers": layers,
    }
    return Refitted(CompressionPlan(tuple(each.plan for each in found)), told)


def within(sequences: Sequence[TokenSequence], tokens: int) -> list[TokenSequence]:
    """All of them, or evenly spaced ones that have about so many tokens; at least one."""
    total = sum(len(sequence.input_ids) for sequence in sequences)
    return list(sequences) if total <= tokens else spaced(sequences, max(1, len(sequences) * tokens // total))


def marked(sequences: Sequence[TokenSequence], held_out: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Both together; the source of each says which it is of."""
    return [
        replace(sequence, sources=(source,) * len(sequence.lengths))
        for source, some in ((CALIBRATION, sequences), (HELD_OUT, held_out))
        for sequence in some
    ]


def counted(text: Sequence[TokenSequence]) -> dict[str, int]:
    """The tokens of ``marked`` text, of each kind."""
    counts = dict.fromkeys((CALIBRATION, HELD_OUT), 0)
    for sequence in text:
        counts[sequence.sources[0]] += len(sequence.input_ids)
    return {"tokens": counts[CALIBRATION], "heldout_tokens": counts[HELD_OUT]}


def check_memory(model: StreamedModel, text: Sequence[TokenSequence], batch_size: int, copies: int) -> None:
    """Raises WinnowError where so many ``copies`` of the text's hidden states do not fit the memory."""
    if len(chunks(replace(model, memory=model.memory // copies), text, batch_size)) > 1:
        tokens = sum(len(sequence.input_ids) for sequence in text)
        raise WinnowError(
            f"refit: {copies} times the hidden states of {tokens:,} tokens do not fit {model.memory / 2**30:.3g} GiB: "
            "set refit.tokens lower, or calibration.memory_gib higher"
        )
