"""Round-to-nearest weights in the ``pack-quantized`` layout of compressed-tensors, which vLLM and transformers read.

A matrix ``X.weight`` [outputs, inputs] is stored as

- ``X.weight_packed`` int32 [outputs, inputs * bits / 32 rounded up]: the integers of a row, the first in the lowest
  bits, each with 2^(bits - 1) added;
- ``X.weight_scale`` [outputs, groups], in the dtype of the weights;
- ``X.weight_zero_point`` int32 [outputs * bits / 32 rounded up, groups]: packed likewise, down the outputs (asymmetric
  only);
- ``X.weight_shape`` int64 [2]: outputs and inputs.

A group is so many inputs of one output, side by side. The definitions are those of compressed-tensors 0.17
(``calculate_qparams`` with ``scale_dtype``, ``quantize``, ``pack_to_int32``), computed in float32 from the stored
weights; the tests compare the bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import WinnowError

SECTION = "quantization_config"
FORMAT = "pack-quantized"
PACKED, SCALE, ZERO_POINT, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


@dataclass(frozen=True)
class Scheme:
    """Integers of ``bits`` bits, with a scale for every ``group`` inputs (None: one for all inputs of an output)."""

    bits: int
    symmetric: bool
    group: int | None

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1


def quantize(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The integers of a matrix [outputs, inputs] (int8), its scales and zero points [outputs, groups].

    w ~ (integer - zero point) * scale. Symmetric: scale = max|w| / ((2^bits - 1) / 2), zero points 0. Asymmetric:
    the range of the group, widened to hold 0, is spread over all 2^bits integers. Scales are rounded to the dtype of
    the weights (int8 zero points, from the scales before that), then the integers are the nearest, ties to even.
    A group of zeros has the scale ``eps`` of its dtype. The group must divide the inputs.
    """
    grouped = weight.float().unflatten(1, (-1, scheme.group or weight.shape[1]))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    steps = scheme.highest - scheme.lowest
    if scheme.symmetric:
        exact = torch.maximum(-low, high) / (steps / 2)
        zero_points = torch.zeros_like(exact)
    else:
        exact = (high - low) / steps
        zero_points = (scheme.lowest - low / exact).clamp(scheme.lowest, scheme.highest).nan_to_num().round()
    scales = exact.to(weight.dtype)
    scales[scales == 0] = torch.finfo(weight.dtype).eps
    integers = grouped / scales.float().unsqueeze(-1) + zero_points.unsqueeze(-1)
    integers = integers.clamp(scheme.lowest, scheme.highest).round()
    return integers.flatten(1).to(torch.int8), scales, zero_points.to(torch.int8)


def dequantize(integers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None) -> torch.Tensor:
    """The matrix [outputs, inputs] in the dtype of its scales."""
    grouped = integers.unflatten(1, (scales.shape[1], -1)).to(scales.dtype)
    if zero_points is not None:
        grouped = grouped - zero_points.unsqueeze(-1).to(scales.dtype)
    return (grouped * scales.unsqueeze(-1)).flatten(1)


def pack(integers: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Signed integers of ``bits`` bits [rows, columns] along ``axis`` in int32, filled up with zero bits."""
    count = 32 // bits
    unsigned = integers.movedim(axis, -1).to(torch.int32) + 2 ** (bits - 1)
    filled = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[-1] % count))
    shifted = filled.unflatten(-1, (-1, count)) << torch.arange(count, dtype=torch.int32) * bits
    return shifted.sum(-1, dtype=torch.int32).movedim(-1, axis).contiguous()


def unpack(packed: torch.Tensor, bits: int, axis: int, size: int) -> torch.Tensor:
    """The int8 that ``pack`` packed, ``size`` of them along ``axis``."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    unsigned = (packed.movedim(axis, -1).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (unsigned.flatten(-2)[..., :size] - 2 ** (bits - 1)).to(torch.int8).movedim(-1, axis)


def packed_parts(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """What is stored of a matrix, by the last part of its name. Raises WinnowError where a weight is not finite."""
    if not weight.isfinite().all():
        raise WinnowError("weights that are not finite cannot be quantised: mend the checkpoint, or take quantize=none")
    integers, scales, zero_points = quantize(weight, scheme)
    parts = {PACKED: pack(integers, scheme.bits, 1), SCALE: scales, SHAPE: torch.tensor(weight.shape)}
    if not scheme.symmetric:
        parts[ZERO_POINT] = pack(zero_points, scheme.bits, 0)
    return parts


def unpacked(parts: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The matrix that ``packed_parts`` stored, dequantised."""
    outputs, inputs = parts[SHAPE].tolist()
    zero_points = None if scheme.symmetric else unpack(parts[ZERO_POINT], scheme.bits, 0, outputs)
    return dequantize(unpack(parts[PACKED], scheme.bits, 1, inputs), parts[SCALE], zero_points)


def part_names(scheme: Scheme) -> list[str]:
    return [PACKED, SCALE, SHAPE, *([] if scheme.symmetric else [ZERO_POINT])]


def part_shapes(outputs: int, inputs: int, groups: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
    """The shapes that ``packed_parts`` gives."""
    count = 32 // scheme.bits
    shapes: dict[str, tuple[int, ...]] = {
        PACKED: (outputs, -(-inputs // count)),
        SCALE: (outputs, groups),
        SHAPE: (2,),
    }
    return shapes if scheme.symmetric else shapes | {ZERO_POINT: (-(-outputs // count), groups)}


def kind_of(name: str) -> str:
    """The name of a tensor with ``*`` for its layer and expert: what tensors of one kind share."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def to_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The section of config.json that says how the matrices of each kind are stored."""
    kinds_of: dict[Scheme, list[str]] = {}
    for kind, scheme in schemes.items():
        kinds_of.setdefault(scheme, []).append(kind)
    groups = {
        f"group_{number}": {
            "targets": ["re:" + re.escape(kind.removesuffix(".weight")).replace(r"\*", r"\d+") + "$" for kind in kinds],
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group is None else "group",
                "group_size": scheme.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (scheme, kinds) in enumerate(kinds_of.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def read_config_groups(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Scheme]]:
    """The schemes of a config.json and the module names that they are for, as ``to_config`` writes them.

    Raises WinnowError for any other quantised checkpoint.
    """
    try:
        section = config[SECTION]
        if section["quant_method"] != "compressed-tensors" or section["format"] != FORMAT:
            raise WinnowError(f"the checkpoint is quantised as {section['quant_method']}: use an unquantised one")
        found = []
        for group in section["config_groups"].values():
            weights = group["weights"]
            if weights["type"] != "int" or weights["num_bits"] not in (4, 8) or group.get("input_activations"):
                raise WinnowError("only weights quantised to int4 or int8 are read: use an unquantised checkpoint")
            if weights["strategy"] not in ("group", "channel") or weights.get("actorder"):
                raise WinnowError("only groups of inputs, in their order, are read: use an unquantised checkpoint")
            scheme = Scheme(weights["num_bits"], weights["symmetric"], weights["group_size"])
            for target in group["targets"]:
                if not target.startswith("re:"):
                    raise WinnowError(f"target '{target}' of {SECTION} is no pattern of names: use an unquantised one")
                found.append((re.compile(target.removeprefix("re:")), scheme))
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise WinnowError(f"config.json: {SECTION} does not describe packed weights ({error!r})") from error
    return found
