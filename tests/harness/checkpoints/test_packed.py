"""Round to nearest, packing and the layout on disk, against loops in float64 and against compressed-tensors."""

import numpy as np
import pytest
import torch

from harness.checkpoints.packed_weights import (
    Scheme,
    dequantize,
    kind_of,
    pack,
    packed_parts,
    part_shapes,
    quantize,
    read_config_groups,
    to_config,
    unpack,
    unpacked,
)
from harness.errors import WinnowError

SCHEMES = [Scheme(bits, symmetric, group) for bits in (4, 8) for symmetric in (True, False) for group in (8, None)]
KINDS = {"model.layers.*.mlp.experts.*.up_proj.weight": Scheme(4, True, 8), "lm.*.o.weight": Scheme(8, False, None)}


def matrix(outputs: int = 5, inputs: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Groups of several sizes, one of them off centre, one of zeros and one without a negative number."""
    torch.manual_seed(3)
    weight = torch.randn(outputs, inputs)
    weight[1] *= 100
    weight[2] += 1.5
    weight[3] = 0
    weight[4] = weight[4].abs()
    return weight.to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_integer_is_the_nearest_and_scales_span_the_group(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = matrix(dtype=dtype)
    integers, scales, zero_points = quantize(weight, scheme)
    assert (integers.dtype, scales.dtype, zero_points.dtype) == (torch.int8, dtype, torch.int8)
    values, size = weight.double().numpy(), scheme.group or 24
    allowed = np.arange(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1))
    for row in range(5):
        for group in range(24 // size):
            own = values[row, group * size : (group + 1) * size]
            low, high = min(own.min(), 0.0), max(own.max(), 0.0)
            if scheme.symmetric:
                exact, zero = max(-low, high) / ((2**scheme.bits - 1) / 2), 0
            else:
                exact = (high - low) / (2**scheme.bits - 1)
                zero = int(np.round(allowed[0] - low / exact)) if exact else 0
            scale = float(scales[row, group].double())
            if exact:
                assert abs(scale / exact - 1) <= torch.finfo(dtype).eps
            assert int(zero_points[row, group]) == zero
            levels = (allowed - zero) * scale
            for place, value in enumerate(own):
                chosen = int(integers[row, group * size + place])
                error = abs((chosen - zero) * scale - value)
                assert error <= np.abs(levels - value).min() + 1e-6 * scale
                # half a step, and what rounding the scale takes off the ends of the range
                assert error <= scale * (0.5 + 2**scheme.bits * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 13), (9, 8), (16, 4)])
@pytest.mark.parametrize("axis", [0, 1])
def test_packing_is_undone_by_unpacking(bits: int, rows: int, columns: int, axis: int) -> None:
    torch.manual_seed(bits)
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    packed = pack(integers, bits, axis)
    shape = [rows, columns]
    assert torch.equal(unpack(packed, bits, axis, shape[axis]), integers)
    shape[axis] = -(-shape[axis] * bits // 32)
    assert packed.dtype == torch.int32 and list(packed.shape) == shape


def test_the_first_integer_lies_in_the_lowest_bits_and_the_rest_is_zero() -> None:
    assert pack(torch.tensor([[1, 2]], dtype=torch.int8), 8, 1).tolist() == [[129 + 256 * 130]]
    assert pack(torch.tensor([[-8], [7], [-7]], dtype=torch.int8), 4, 0).tolist() == [[0 + 16 * 15 + 256 * 1]]
    assert pack(torch.tensor([[0] * 7 + [7]], dtype=torch.int8), 4, 1).tolist() == [[0xF8888888 - 2**32]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_stored_gives_the_quantised_values(scheme: Scheme) -> None:
    weight = matrix(dtype=torch.bfloat16)
    parts = packed_parts(weight, scheme)
    groups = 1 if scheme.group is None else 3
    assert {name: tuple(part.shape) for name, part in parts.items()} == part_shapes(5, 24, groups, scheme)
    integers, scales, zero_points = quantize(weight, scheme)
    found = unpacked(parts, scheme)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, dequantize(integers, scales, zero_points))
    each = scheme.group or 24
    exact = (integers.double() - zero_points.double().repeat_interleave(each, 1)) * scales.double().repeat_interleave(
        each, 1
    )
    assert torch.equal(found, exact.to(torch.bfloat16))
    assert not found[3].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [24, 13])
def test_the_bytes_are_those_of_compressed_tensors(scheme: Scheme, dtype: torch.dtype, inputs: int) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    if inputs % (scheme.group or inputs):
        return
    weight = matrix(inputs=inputs, dtype=dtype)
    config = to_config({"a.weight": scheme})["config_groups"]["group_0"]
    theirs = quantization.QuantizationScheme(**config)
    arguments = theirs.weights.model_copy(update={"scale_dtype": dtype})
    grouped = weight.float().unflatten(1, (-1, scheme.group or inputs))
    scales, zero_points = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    state = {"weight": weight.float(), "weight_scale": scales, "weight_zero_point": zero_points}
    if not scheme.symmetric:
        zero_points[3] = 0  # theirs are what a processor makes of not-a-number, for a group of zeros
    stored = PackedQuantizationCompressor.compress(state, theirs)
    parts = packed_parts(weight, scheme)
    assert parts.keys() == stored.keys()
    for name, part in parts.items():
        assert torch.equal(part, stored[name].to(dtype) if name == "weight_scale" else stored[name])
    back = PackedQuantizationCompressor.decompress({**parts}, theirs)["weight"]
    assert torch.equal(unpacked(parts, scheme), back)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(WinnowError, match="not finite"):
        packed_parts(torch.tensor([[1.0, float("nan")]]), Scheme(4, True, None))


def test_config_and_schemes_are_read_as_written() -> None:
    found = read_config_groups({"quantization_config": to_config(KINDS)})
    for kind, scheme in KINDS.items():
        module = kind.removesuffix(".weight").replace("*", "11")
        assert [s for pattern, s in found if pattern.match(module)] == [scheme]
        assert not any(pattern.match(module + "_more") for pattern, _ in found)
    assert kind_of("model.layers.3.mlp.experts.12.up_proj.weight") == "model.layers.*.mlp.experts.*.up_proj.weight"
    assert kind_of("model.layers.0.w1.weight") == "model.layers.*.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantised as gptq"),
        ({"format": "float-quantized"}, "use an unquantised one"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "does not describe packed weights"),
        ({"config_groups": None}, "does not describe packed weights"),
        ({"config_groups": {"g": {"targets": ["re:x"], "weights": {"type": "float", "num_bits": 8}}}}, "int4 or int8"),
    ],
)
def test_another_quantization_is_not_guessed_at(change: dict, message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        read_config_groups({"quantization_config": to_config(KINDS) | change})
