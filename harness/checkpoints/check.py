"""A checkpoint against its config.json: does every MoE tensor have the shape that is announced?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoints.config import config_integer
from harness.checkpoints.experts import router_biases
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.standins import standin_shapes
from harness.errors import WinnowError
from harness.families.family import Family

EMBEDDINGS = "model.embed_tokens.weight"


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
            expected |= dict(zip(tensor.names(layer, layout.numbers), shapes, strict=True))
        expected |= standin_shapes(family, layer, layout, hidden)
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
    _check_vocabulary(folder, config, reader)
    for name, announced in expected.items():
        found = reader.shape(name)
        if found != announced:
            raise WinnowError(f"{folder}: {name} has shape {found}, but config.json implies {announced}")


def check_names(folder: Path, config: Mapping[str, Any]) -> None:
    """What transformers would look up in its own tables while it builds the model. Raises WinnowError."""
    from transformers.activations import ACT2FN  # here, as it takes seconds to import
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    activation = config.get("hidden_act")
    if activation is not None and activation not in ACT2FN:
        raise WinnowError(f"{folder}: config.json names the unknown activation hidden_act={activation!r}")
    for section in ("rope_parameters", "rope_scaling"):
        told = config.get(section)
        if told is None:
            continue
        if not isinstance(told, Mapping):
            raise WinnowError(f"{folder}: config.json: {section} must be an object, not {told!r}")
        kinds = [told, *(one for one in told.values() if isinstance(one, Mapping))]
        named = [kind.get("rope_type", kind.get("type")) for kind in kinds]
        for name in named:
            if name not in (None, "default", "mrope", "su", *ROPE_INIT_FUNCTIONS):
                known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
                raise WinnowError(f"{folder}: config.json: unknown rope type {name!r} in {section}; known: {known}")


def _check_vocabulary(folder: Path, config: Mapping[str, Any], reader: CheckpointReader) -> None:
    if EMBEDDINGS not in reader:
        return
    stored, announced = reader.shape(EMBEDDINGS)[0], config_integer(config, "vocab_size")
    if stored != announced:
        raise WinnowError(
            f"{folder}: config.json says vocab_size={announced}, but {EMBEDDINGS} has {stored} rows: "
            f"set vocab_size to {stored}, or fetch the checkpoint again"
        )
