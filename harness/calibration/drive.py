"""The one place that runs a model's decoder layers over batches of tokens.

Callers hand in observers (``harness.calibration.observer``), each of one MoE layer, and never see the loop. So what
stands behind ``drive`` can change: the whole model on its devices, all layers observed at once, or one layer at a time
(``harness.calibration.streamed``). An observer is told of nothing but its own layer, whose weights are there from the
beginning of ``watching`` to its end; it may be watching before, after or while the observers of other layers do.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from harness import progress
from harness.calibration.batches import Batch, in_batches
from harness.calibration.hidden_states import HiddenStates, InMemory
from harness.calibration.observer import Observer
from harness.calibration.streamed import Model, StreamedModel
from harness.calibration.tokens import TokenSequence
from harness.calibration.unfinished import Saved
from harness.checkpoints.offload import device_of
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.moe_block import MoeBlock, moe_block


def drive(
    model: Model,
    family: Family,
    sequences: Sequence[TokenSequence],
    observers: Sequence[Observer],
    batch_size: int,
    label: str = "",
    state: Path | None = None,
) -> None:
    """Runs the decoder layers of ``model`` over ``sequences``, in batches by length, the longest first.

    ``label`` names the progress bar, which counts the tokens of a whole model, and of a streamed one those of every
    layer; none is shown without it. ``state`` is the folder of ``unfinished.kept`` (None: nothing is kept). Raises
    WinnowError where the sequences do not fit the model.
    """
    check_fit(model, family, sequences, batch_size)
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    if isinstance(model, StreamedModel):
        tokens *= 1 + max(observer.layer for observer in observers)
    with progress.bar(label, tokens, unit="token") as bar, torch.inference_mode():
        if isinstance(model, StreamedModel):
            _run_by_layer(model, sequences, observers, batch_size, bar, state)
        else:
            _run_whole_model(model, family, in_batches(sequences, batch_size), observers, bar.update)


def visit(model: Model, family: Family, layers: Iterable[int], look: Callable[[int, MoeBlock], None]) -> None:
    """``look(layer, block)`` at the MoE blocks of ``layers``, one after the other, while the weights of each are there.

    For what is computed of a layer with inputs of one's own.
    """
    with torch.inference_mode():
        if isinstance(model, StreamedModel):
            for layer in model.model.layers(layers):
                look(layer, moe_block(model.skeleton, family, layer))
            return
        for layer in layers:
            look(layer, moe_block(model, family, layer))


def _run_whole_model(
    model: PreTrainedModel,
    family: Family,
    batches: Iterable[Batch],
    observers: Sequence[Observer],
    advance: Callable[[int], object],
) -> None:
    model.eval()
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching(moe_block(model, family, observer.layer)))
        for batch in batches:
            for observer in observers:
                observer.start_batch(batch.layout)
            _forward(model, batch)
            for observer in observers:
                observer.end_batch()
            advance(batch.layout.tokens)


def _run_by_layer(
    streamed: StreamedModel,
    sequences: Sequence[TokenSequence],
    observers: Sequence[Observer],
    batch_size: int,
    bar: Any,
    state: Path | None,
) -> None:
    """``bar`` counts every token once a layer. With the folder ``state`` observers must be ``Resumable``."""
    model, batches = streamed.model, list(in_batches(sequences, batch_size))
    last = max(observer.layer for observer in observers)
    saved = None if state is None else Saved(state, model, batches, observers)
    first = 0 if saved is None else saved.restore(last)
    hidden: HiddenStates = InMemory(len(batches)) if saved is None else saved.hidden
    bar.update(first * sum(batch.layout.tokens for batch in batches))
    for layer in model.layers(range(first, last + 1)):
        bar.set_postfix_str(f"layer {layer + 1} of {last + 1}")
        here = [observer for observer in observers if observer.layer == layer]
        with ExitStack() as stack:
            for observer in here:
                stack.enter_context(observer.watching(moe_block(model.skeleton, model.family, layer)))
            passage = stack.enter_context(hidden.through(layer, layer == last))
            for batch in batches:
                for observer in here:
                    observer.start_batch(batch.layout)
                passage.put(model.run(layer, passage.next(), batch.inputs(model.device)))
                for observer in here:
                    observer.end_batch()
                bar.update(batch.layout.tokens)
        if saved is not None:
            saved.save(layer, here)


def _forward(model: PreTrainedModel, batch: Batch) -> None:
    """The decoder alone: nobody reads the logits over the vocabulary, the largest tensor of all."""
    embedding: Any = model.get_input_embeddings()
    inputs: dict[str, Any] = batch.inputs(device_of(embedding))
    model.base_model(**inputs, use_cache=False)


def check_fit(model: Model, family: Family, sequences: Sequence[TokenSequence], batch_size: int) -> None:
    """Raises WinnowError where the sequences, or batches of them, do not fit the model."""
    if not family.separates_packed and any(len(sequence.lengths) > 1 for sequence in sequences):
        raise WinnowError(f"calibration.packing: a {family.model_type} model mixes packed documents; set it to false")
    if batch_size < 1:
        raise WinnowError(f"calibration.batch_size must be at least 1, not {batch_size}")
    if not sequences:
        raise WinnowError("the calibration corpus is empty: it has no token sequences")
    whole = model.skeleton if isinstance(model, StreamedModel) else model
    embedding: Any = whole.get_input_embeddings()
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
