"""Batches of a calibration pass, and what is where in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.calibration.tokens import TokenSequence


@dataclass(frozen=True)
class BatchLayout:
    """What is where among the N = batch * length flat positions of a right-padded batch.

    ``real`` (N,) bool is False on padding; ``documents`` are (start, end) ranges; ``source`` (N,) int64 is
    the index of each position's source. ``tokens`` is the number of real positions.
    """

    real: Tensor
    documents: tuple[tuple[int, int], ...]
    source: Tensor
    tokens: int

    @property
    def padded(self) -> bool:
        return self.tokens < self.real.numel()


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor  # (B, L)
    attention_mask: Tensor | None  # (B, L), where there is padding and no packing
    position_ids: Tensor | None  # (B, L), where sequences are packed
    layout: BatchLayout


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
