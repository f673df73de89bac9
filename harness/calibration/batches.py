"""Batches of a calibration pass, and what is where in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harness.calibration.tokens import TokenSequence


@dataclass(frozen=True)
class BatchLayout:
    """What is where among the N = batch * length flat positions of a right-padded batch.

    ``real`` (N,) bool is False on padding; ``documents`` are (start, end) ranges; ``source`` (N,) int64 is
    the index of each position's source, ``ids`` (N,) that of its token in the vocabulary. ``tokens`` is the number of
    real positions.
    """

    real: Tensor
    documents: tuple[tuple[int, int], ...]
    source: Tensor
    tokens: int
    ids: Tensor

    @property
    def padded(self) -> bool:
        return self.tokens < self.real.numel()

    def to(self, device: torch.device) -> "BatchLayout":
        return replace(self, real=self.real.to(device), source=self.source.to(device), ids=self.ids.to(device))

    def without_padding(self, values: Tensor) -> Tensor:
        """The real positions of ``values`` (N, ...)."""
        return values[self.real] if self.padded else values


@dataclass(frozen=True)
class Batch:
    """What the model is given; B sequences of at most L tokens."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor | None  # (B, L), where there is padding and no packing
    position_ids: Tensor | None  # (B, L), where sequences are packed
    layout: BatchLayout

    def inputs(self, device: torch.device) -> dict[str, Tensor | None]:
        """On ``device``, by the names of the model's arguments."""
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return {name: None if tensor is None else tensor.to(device) for name, tensor in named.items()}


def sources_of(sequences: Sequence[TokenSequence]) -> list[str]:
    """The names of the sources, in the order that ``BatchLayout.source`` counts in."""
    return sorted({source for sequence in sequences for source in sequence.sources})


def evenly_spaced(total: int, limit: int | None) -> Tensor:
    """Places in 0 .. ``total`` - 1, in rising order: ``limit`` of them, or all where there are no more (None: all)."""
    count = total if limit is None else min(total, limit)
    return torch.arange(count) * total // max(count, 1)


def in_order_of_pass(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The longest first, so that what does not fit in memory fails at once, and batches have similar lengths."""
    return sorted(sequences, key=lambda sequence: -len(sequence.input_ids))


def in_batches(sequences: Sequence[TokenSequence], batch_size: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` sequences, in the order of a pass."""
    ordered, sources = in_order_of_pass(sequences), sources_of(sequences)
    for start in range(0, len(ordered), batch_size):
        yield _batch(ordered[start : start + batch_size], sources)


def _batch(sequences: Sequence[TokenSequence], sources: Sequence[str]) -> Batch:
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
        torch.from_numpy(input_ids).reshape(-1),
    )
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if packed or real.all() else torch.from_numpy(real).long(),
        position_ids=torch.from_numpy(position_ids) if packed else None,
        layout=layout,
    )
