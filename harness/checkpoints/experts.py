"""Single experts of a checkpoint: their tensors, their weights, and what padding them takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.checkpoints.reader import CheckpointReader
from harness.contracts.statistics import ExpertWeights
from harness.families.family import Family
from harness.families.tensors import ExpertTensor


def router_biases(reader: CheckpointReader, family: Family, layer: int) -> list[str]:
    """The biases of a router that the checkpoint has: settings of the model may leave them out."""
    names = (template.format(layer=layer) for template in family.router_biases)
    return [name for name in names if name in reader]


def expert_part(reader: CheckpointReader, tensor: ExpertTensor, layer: int, expert: int) -> torch.Tensor:
    """What ``tensor`` holds of one expert, of ``ExpertTensor.shape``; a view of the mapped file."""
    name = tensor.name.format(layer=layer, expert=expert)
    return reader.tensor(name)[expert] if tensor.is_stacked else reader.tensor(name)


def expert_weights_reader(folder: Path, family: Family) -> Callable[[int, int], ExpertWeights]:
    """A function (layer, expert) -> the expert's matrices (no biases) in float32, read when it is called."""
    reader = CheckpointReader(folder)

    def read(layer: int, expert: int) -> ExpertWeights:
        found: dict[str, Any] = {}
        for tensor in family.expert_tensors:
            if tensor.is_bias or tensor.channel_axis is None:
                continue
            channels = expert_part(reader, tensor, layer, expert).movedim(tensor.channel_axis, 0)
            count = len(tensor.matrices)
            for place, matrix in enumerate(tensor.matrices):
                rows = channels[place::count] if tensor.interleaved else channels.chunk(count)[place]
                found[matrix] = (rows.T if matrix == "down" else rows).float().numpy()
        return ExpertWeights(**found)

    return read


def router_rows_reader(folder: Path, family: Family) -> Callable[[int], np.ndarray]:
    """A function (layer) -> the rows (E, H) of the router's matrix in float32, read when it is called."""
    reader = CheckpointReader(folder)
    (name,) = family.router_tensors
    return lambda layer: reader.tensor(name.format(layer=layer)).float().numpy()


def widened(part: torch.Tensor, tensor: ExpertTensor, width: int, wider: int) -> torch.Tensor:
    """One expert's part of ``width`` channels with channels of zeros behind them, ``wider`` in all.

    Exact: a channel of zeros has a gate of zero, and adds nothing to the expert's output.
    """
    axis = tensor.channel_axis
    if axis is None or width == wider:
        return part
    shape = list(part.shape)
    shape[axis] = wider * len(tensor.matrices)
    places = torch.tensor(tensor.places(range(width), wider))
    return part.new_zeros(shape).index_copy_(axis, places, part)


def padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``matrix`` with zeros below and to its right. Exact for an expert: a channel of zeros adds silu(0) * 0 = 0."""
    if matrix.shape == (rows, columns):
        return matrix
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
