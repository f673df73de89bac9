"""The pass of a method that decides layer by layer: look at a layer, decide, run it again as it will be.

The model is always read one layer at a time, also one that fits the memory: two passes over the text through each MoE
layer but the last, with the hidden states of all sequences kept in between. Killed, it goes on behind the last layer.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch

from harness import progress
from harness.calibration.batches import evenly_spaced, in_batches, sources_of
from harness.calibration.collected import Collected, Part
from harness.calibration.collectors.table import collectors_for
from harness.calibration.drive import check_fit
from harness.calibration.hidden_states import HiddenStates, InMemory
from harness.calibration.recorder import Recorder
from harness.calibration.streamed import StreamedModel
from harness.calibration.tokens import TokenSequence
from harness.calibration.unfinished import Saved, kept
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.layerwise import LayerwiseMethod
from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, LayerPlan
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.layerwise.apply import applied
from harness.layerwise.watch import LayerWatch


def decide_by_layer(
    model: StreamedModel,
    method: LayerwiseMethod,
    ratio: Fraction,
    seed: int,
    sequences: Sequence[TokenSequence],
    like: Statistics,
    batch_size: int = 8,
    all_tokens: int | None = None,
    lower_top_k: bool = False,
    corpus: str = "",
) -> tuple[Decision, Collected]:
    """What ``method`` decides about each MoE layer of ``model``, one after the other, and what was collected meanwhile.

    ``like`` has what is known of the intact model without a pass. ``all_tokens`` of the text, evenly spaced, stand for
    all where every expert runs on every token (None: all do). ``lower_top_k``: where fewer experts are left than tokens
    choose, they choose all of them.

    Raises WinnowError as the method does, where the text does not fit the model or the memory, and where anything turns
    NaN or infinite.
    """
    family, config = model.model.family, model.config.to_dict()
    check_fit(model, family, sequences, batch_size)
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    count = len(evenly_spaced(tokens, all_tokens))
    _check_memory(model, tokens if method.every_token else count)
    sources = sources_of(sequences)
    make = partial(collectors_for, method.looks_at, len(sources), Part(0, tokens), config["vocab_size"])

    def watch(layer: int) -> LayerWatch:
        recorder = Recorder(layer, family.router_output, make, sigmoid=family.sigmoid_router)
        decide = partial(method.decide, ratio=ratio, seed=seed)
        known = replace(like, tokens=tokens)
        return LayerWatch(recorder, decide, known, family.top_k(config), all_tokens, method.every_token)

    watches = [watch(layer) for layer in family.moe_layers(config)]
    asked = [repr(method), method.version, str(ratio), seed if method.uses_seed else 0, all_tokens, lower_top_k]
    started = time.perf_counter()
    with kept(model, sequences, None, {"layerwise": asked, "batch_size": batch_size}) as state:
        label = f"{method.name}, layer by layer" + (f" over {corpus}" if corpus else "")
        _run(model, watches, sequences, batch_size, method.sequential, lower_top_k, label, state)
    collected = Collected(
        num_experts=like.num_experts,
        top_k=like.top_k,
        n_group=like.n_group,
        sequences=len(sequences),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        layers={each.layer: each.recorder.arrays for each in watches},
        usage={
            source: {str(each.layer): each.recorder.usage[place].tolist() for each in watches}
            for place, source in enumerate(sources)
        },
    )
    return replace(_together([each.decision for each in watches]), all_tokens=count), collected


def _run(
    streamed: StreamedModel,
    watches: Sequence[LayerWatch],
    sequences: Sequence[TokenSequence],
    batch_size: int,
    sequential: bool,
    lower_top_k: bool,
    label: str,
    state: Path | None,
) -> None:
    """The progress bar counts every token once a layer, and again where the layer is run with its plan."""
    model, batches = streamed.model, list(in_batches(sequences, batch_size))
    by_layer = {each.layer: each for each in watches}
    last = max(by_layer)
    again = {layer for layer in by_layer if sequential and layer < last}
    saved = None if state is None else Saved(state, model, batches, watches)
    first = 0 if saved is None else saved.restore(last)
    hidden: HiddenStates = InMemory(len(batches)) if saved is None else saved.hidden
    tokens = sum(batch.layout.tokens for batch in batches)
    with progress.bar(label, tokens * (last + 1 + len(again)), unit="token") as bar, torch.inference_mode():
        bar.update(tokens * (first + sum(layer < first for layer in again)))

        def through(layer: int, watch: LayerWatch | None, hand_on: bool) -> None:
            with hidden.through(layer, not hand_on) as passage:
                for batch in batches:
                    if watch is not None:
                        watch.start_batch(batch.layout)
                    passage.put(model.run(layer, passage.next(), batch.inputs(model.device)))
                    if watch is not None:
                        watch.end_batch()
                    bar.update(batch.layout.tokens)

        for layer in model.layers(range(first, last + 1)):
            bar.set_postfix_str(f"layer {layer + 1} of {last + 1}")
            watch = by_layer.get(layer)
            if watch is None:
                through(layer, None, hand_on=layer < last)
            else:
                block = moe_block(model.skeleton, model.family, layer)
                with watch.watching(block):
                    through(layer, watch, hand_on=layer < last and layer not in again)
                if layer in again:
                    (plan,) = watch.decision.plan.layers
                    with applied(block, plan, model.family, _top_k(model, plan, lower_top_k), _stored(model, layer)):
                        through(layer, None, hand_on=True)
            if saved is not None:
                saved.save(layer, [] if watch is None else [watch])


def _top_k(model: ModelByLayer, plan: LayerPlan, lower: bool) -> int:
    top_k = model.family.top_k(model.config.to_dict())
    return min(top_k, sum(new is not None for new in plan.route)) if lower else top_k


def _stored(model: ModelByLayer, layer: int) -> torch.dtype:
    name = model.family.expert_tensors[0].names(layer, 1)[0]
    return CheckpointReader(model.folder).tensor(name).dtype


def _together(decisions: Sequence[Decision]) -> Decision:
    """Of one layer each."""
    saliency = {layer: values for each in decisions for layer, values in (each.saliency or {}).items()}
    groups = {layer: labels for each in decisions for layer, labels in (each.groups or {}).items()}
    plan = CompressionPlan(tuple(layer for each in decisions for layer in each.plan.layers))
    return Decision(plan, saliency=saliency or None, groups=groups or None, largest_goes=decisions[0].largest_goes)


def _check_memory(model: StreamedModel, tokens: int) -> None:
    """Raises WinnowError where the inputs of so many tokens, and as many router logits, are too much for the host."""
    config = model.config.to_dict()
    each = (int(config["hidden_size"]) + model.model.family.num_experts(config)) * model.model.dtype.itemsize
    if tokens * each > model.memory:
        raise WinnowError(
            f"what goes into a layer's experts of {tokens:,} tokens takes {tokens * each / 2**30:.3g} GiB, but "
            f"{model.memory / 2**30:.3g} are left: set calibration.all_tokens, or calibration.num_sequences lower, or "
            "calibration.memory_gib higher"
        )
