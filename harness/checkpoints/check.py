"""A checkpoint against its config.json: does every MoE tensor have the shape that is announced?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoints.config import config_integer
from harness.checkpoints.experts import router_biases
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.reader import CheckpointReader
from harness.errors import WinnowError
from harness.families.family import Family


def check_checkpoint(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Compare the MoE tensors that config.json announces with the headers of the files; reads no values.

    Raises WinnowError for every fault named under ``CheckpointReader``, for a missing tensor, one of another
    shape, and for tensors among the experts that the family does not know (more experts, fused or quantised).
    """
    reader = CheckpointReader(folder)
    layouts = layer_layouts(config, family)
    hidden = config_integer(config, "hidden_size")
    expected: dict[str, tuple[int, ...]] = {}
    for layer, layout in layouts.items():
        for tensor in family.expert_tensors:
            parts = [tensor.shape(width, hidden) for width in layout.widths]
            shapes = [(len(parts), *parts[0])] if tensor.is_stacked else parts
            expected |= dict(zip(tensor.names(layer, layout.experts), shapes, strict=True))
        for template in family.router_tensors:
            name = template.format(layer=layer)
            expected[name] = (layout.rows, *reader.shape(name)[1:])
        for name in router_biases(reader, family, layer):
            expected[name] = (*reader.shape(name)[:-1], layout.rows)
    prefixes = tuple({t.name.split("{expert}")[0].format(layer=n) for t in family.expert_tensors for n in layouts})
    unknown = [name for name in reader.names() if name.startswith(prefixes) and name not in expected]
    if unknown:
        raise WinnowError(
            f"{folder} has expert tensors that its config.json does not account for, such as {unknown[0]}: "
            "more experts than announced, or a fused or quantised layout; save it again with save_pretrained"
        )
    for name, announced in expected.items():
        found = reader.shape(name)
        if found != announced:
            raise WinnowError(f"{folder}: {name} has shape {found}, but config.json implies {announced}")
