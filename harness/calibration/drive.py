"""The one place that runs a model's layers over batches."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from harness.calibration.batches import _Batch
from harness.calibration.tokens import TokenSequence
from harness.errors import WinnowError
from harness.families.family import Family


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
