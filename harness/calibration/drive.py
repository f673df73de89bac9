"""The one place that runs a model's decoder layers over batches of tokens.

Callers hand in observers, each of one MoE layer, and never see the loop. So what stands behind ``drive`` can change:
here it is the whole model on its devices, all layers observed at once. An observer is told of nothing but its own
layer, whose weights are there from the beginning of ``watching`` to its end; it may be watching before, after or
while the observers of other layers do.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness import progress
from harness.calibration.batches import Batch, BatchLayout, in_batches
from harness.calibration.offload import device_of
from harness.calibration.tokens import TokenSequence
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.moe_block import MoeBlock, moe_block


class Observer(Protocol):
    """Looks at one MoE layer while batch after batch goes through it."""

    @property
    def layer(self) -> int:
        """The index of the decoder layer."""
        ...

    def watching(self, block: MoeBlock) -> AbstractContextManager[None]:
        """Hooks on ``block`` for as long as the context lasts. All batches go through it inside of the context.

        Where the context ends without an error, the observer finishes what needs the weights of the block.
        """
        ...

    def start_batch(self, layout: BatchLayout) -> None: ...

    def end_batch(self) -> None:
        """The batch is through the layer. Raises WinnowError where what was seen is not finite."""
        ...


def drive(
    model: PreTrainedModel,
    family: Family,
    sequences: Sequence[TokenSequence],
    observers: Sequence[Observer],
    batch_size: int,
    label: str = "",
) -> None:
    """Runs the decoder layers of ``model`` over ``sequences``, in batches by length, the longest first.

    ``label`` names the progress bar; none is shown without it. Raises WinnowError where the sequences do not fit the
    model.
    """
    _check_fit(model, family, sequences, batch_size)
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    with progress.bar(label, tokens, unit="token") as bar, torch.inference_mode():
        _run_whole_model(model, family, in_batches(sequences, batch_size), observers, bar.update)


def visit(model: PreTrainedModel, family: Family, layers: Iterable[int], look: Callable[[int, MoeBlock], None]) -> None:
    """``look(layer, block)`` at the MoE blocks of ``layers``, one after the other, while the weights of each are there.

    For what is computed of a layer with inputs of one's own.
    """
    with torch.inference_mode():
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


def _forward(model: PreTrainedModel, batch: Batch) -> None:
    """The decoder alone: nobody reads the logits over the vocabulary, the largest tensor of all."""
    embedding: Any = model.get_input_embeddings()
    device = device_of(embedding)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    model.base_model(
        input_ids=there(batch.input_ids),
        attention_mask=there(batch.attention_mask),
        position_ids=there(batch.position_ids),
        use_cache=False,
    )


def _check_fit(model: PreTrainedModel, family: Family, sequences: Sequence[TokenSequence], batch_size: int) -> None:
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
