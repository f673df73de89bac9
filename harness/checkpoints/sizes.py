"""Sizes of a checkpoint as it lies on disk: bytes and parameters, of all and of the routed experts."""

from math import prod
from pathlib import Path

from harness.checkpoints.config import read_config
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.standins import standin_shapes
from harness.families.table import family_of


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Sizes of a checkpoint as stored: plain or compact, quantised or not.

    ``weight_bytes`` the weight files on disk, ``largest_shard_bytes`` the largest of them, ``parameters`` all
    elements (a packed weight is one), ``expert_bytes`` and ``expert_parameters`` those of the routed experts, with the
    scales and zero points of packed ones and with what stands for experts. ``padding_bytes`` (not on disk) what padding
    every expert to the widest of its layer adds in the stored dtype, as ``load_model`` does.
    """
    config, reader = read_config(folder), CheckpointReader(folder)
    family = family_of(config)
    expert_names: list[str] = []
    padding_bytes = 0
    for layer, layout in layer_layouts(config, family).items():
        expert_names += standin_shapes(family, layer, layout, 1)
        for tensor in family.expert_tensors:
            names = tensor.names(layer, layout.numbers)
            expert_names += names
            if layout.is_ragged:  # one expert a tensor
                sizes = zip(map(reader.nbytes, names), layout.widths, strict=True)
                padding_bytes += sum(nbytes // width * (layout.width - width) for nbytes, width in sizes)
    file_sizes = [path.stat().st_size for path in reader.files]
    return {
        "weight_bytes": sum(file_sizes),
        "largest_shard_bytes": max(file_sizes),
        "parameters": sum(prod(reader.shape(name)) for name in reader.names()),
        "expert_bytes": sum(reader.nbytes(name) for name in expert_names),
        "expert_parameters": sum(prod(reader.shape(name)) for name in expert_names),
        "padding_bytes": padding_bytes,
    }
