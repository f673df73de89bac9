"""Sizes of a checkpoint before and after a method, and memory of the stages of a cell, from shapes alone.

Everything here is arithmetic over ``Headers``: the names and shapes of the tensors, read from the headers of a folder's
files or made from a config.json on torch's meta device, where no tensor has values. E experts, H hidden size, I
channels of an expert, k top-k.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from harness.checkpoints import packed_weights as packed
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import config_integer
from harness.checkpoints.layout import (
    LayerLayout,
    LowRankLayout,
    approximated_layout,
    is_compact,
    layer_layouts,
    with_layouts,
)
from harness.checkpoints.quantize import Quantization
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.standins import NO_PLACE, ONLY_CONSTANTS, standin_shapes
from harness.contracts.layerwise import layerwise
from harness.contracts.method import Method
from harness.contracts.statistics import STATISTICS, ExpertWeights, Routing, Statistics
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of

_HIDDEN, _NARROW = 8, 16  # sizes of the layer that a method decides on in a dry run
_HUB_SHARD = 5 * 10**9  # the largest file that tools write to the hub unless told otherwise


@dataclass(frozen=True)
class Headers:
    """Names, shapes and bytes of a checkpoint's tensors: what a ``CheckpointReader`` knows without their values."""

    shapes: Mapping[str, tuple[int, ...]]
    bytes: Mapping[str, int]

    def names(self) -> list[str]:
        return list(self.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def nbytes(self, name: str) -> int:
        return self.bytes[name]

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint without its weights. ``largest_shard`` (bytes) is a guess where there are no files yet."""

    config: Mapping[str, Any]
    family: Family
    headers: Headers
    largest_shard: int

    @property
    def expert_names(self) -> list[str]:
        layouts = layer_layouts(self.config, self.family)
        tensors = [(tensor, layer) for layer in layouts for tensor in self.family.expert_tensors]
        return [name for tensor, layer in tensors for name in tensor.names(layer, layouts[layer].numbers)]

    @property
    def expert_parameters(self) -> int:
        return sum(prod(self.headers.shape(name)) for name in self.expert_names)

    @property
    def active_parameters(self) -> int:
        """Those that take part in one token: all but the routed experts, and k of E of these."""
        idle = Fraction(self.expert_parameters * (self.num_experts - self.top_k), self.num_experts)
        return self.headers.parameters - int(idle)

    @property
    def num_experts(self) -> int:
        return self.family.num_experts(self.config)

    @property
    def top_k(self) -> int:
        return self.family.top_k(self.config)

    @property
    def width(self) -> int:
        return self.family.width(self.config)


@dataclass(frozen=True)
class Kept:
    """What a method leaves in each MoE layer: experts with so many channels, router rows, and so many constants in the
    place of experts, or with ``rank`` above 0 low-rank maps, each with a shift."""

    widths: tuple[int, ...]
    rows: int
    standins: int = 0
    rank: int = 0

    @property
    def constants(self) -> int:
        return 0 if self.rank else self.standins

    @property
    def low_rank(self) -> tuple[LowRankLayout, ...]:
        return (LowRankLayout(self.rank, None, True),) * (self.standins if self.rank else 0)


def anatomy_of_folder(folder: Path, config: Mapping[str, Any]) -> Anatomy:
    """From the headers of the files. Raises WinnowError as ``check_checkpoint`` does."""
    family = family_of(config)
    _check_unquantised(config)
    check_checkpoint(folder, family, config)
    reader = CheckpointReader(folder)
    names = reader.names()
    headers = Headers({name: reader.shape(name) for name in names}, {name: reader.nbytes(name) for name in names})
    return Anatomy(config, family, headers, max(path.stat().st_size for path in reader.files))


def anatomy_of_config(config: Mapping[str, Any]) -> Anatomy:
    """From config.json: the tensors that transformers would save of such a model, in the dtype that it states.

    Layers for multi-token prediction, which some checkpoints carry and transformers leaves out, are not counted.
    Raises WinnowError for an architecture without a row, a quantised checkpoint and a config that is not complete.
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    family = family_of(config)
    _check_unquantised(config)
    dtype = dtype_named(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(family.parsed(config), dtype=dtype)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WinnowError(f"config.json does not describe a complete {family.model_type} model: {reason}") from error
    tied = set(model.all_tied_weights_keys)  # stored once, by the name of the other
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    stored = revert_weight_conversion(model, state)
    headers = Headers(
        {name: tuple(tensor.shape) for name, tensor in stored.items()},
        {name: tensor.nbytes for name, tensor in stored.items()},
    )
    return Anatomy(config, family, headers, min(headers.total_bytes, _HUB_SHARD))


def _check_unquantised(config: Mapping[str, Any]) -> None:
    if packed.SECTION in config:
        how = config[packed.SECTION].get("quant_method", "unknown")
        raise WinnowError(f"its weights are stored quantised ({how}), and winnow compresses plain ones: give bf16 ones")


def dtype_named(name: str) -> torch.dtype:
    """Raises WinnowError where torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WinnowError(f"dtype '{name}' is unknown: choose bfloat16, float16 or float32")
    return dtype


def outcome(method: Method, ratio: Fraction, model: Anatomy, seed: int = 0) -> Kept:
    """What ``method`` leaves of each layer at ``ratio``: its own decision about one layer of made-up statistics.

    How many experts, rows and channels stay hangs on E, k, the router's groups and I alone, not on the statistics;
    which ones does not matter for sizes. Where a method shares its budget out between layers or experts, the total
    stays, and the sizes are those of the mean layer; only where experts differ in width do the statistics decide how
    many lose all channels, and with them their router rows. Raises WinnowError as the method does.
    """
    if is_compact(model.config):
        raise WinnowError("the checkpoint is compressed already: give the one that it was made from")
    method = getattr(method, "mean_layer", method)  # where a budget names every layer
    kept = _decide(method, ratio, model, _NARROW, seed)
    if set(kept.widths) == {_NARROW}:  # whole experts: cheaper to find out on narrow ones
        return replace(kept, widths=(model.width,) * len(kept.widths))
    return _decide(method, ratio, model, model.width, seed)


def _decide(method: Method, ratio: Fraction, model: Anatomy, width: int, seed: int) -> Kept:
    experts, rng = model.num_experts, np.random.default_rng(0)

    def made_up(name: str) -> np.ndarray:
        sizes = STATISTICS[name].sizes(experts, _HIDDEN, width, tokens=1)
        values = rng.random(sizes) + 0.5
        return values @ values.T if len(sizes) == 2 and sizes[0] == sizes[1] == experts else values

    def weights(layer: int, expert: int) -> ExpertWeights:
        draw = np.random.default_rng(expert)
        shapes = (width, _HIDDEN), (width, _HIDDEN), (_HIDDEN, width)
        return ExpertWeights(*(draw.standard_normal(shape, dtype=np.float32) for shape in shapes))

    def router(layer: int, inputs: np.ndarray) -> Routing:
        chosen = np.tile(np.arange(model.top_k), (len(inputs), 1))
        return lambda kept: (np.ones(chosen.shape), chosen)

    def router_rows(layer: int) -> np.ndarray:
        return np.random.default_rng(layer).standard_normal((experts, _HIDDEN), dtype=np.float32)

    by_layer = layerwise(method)
    looks_at: frozenset[str] = frozenset() if by_layer is None else by_layer.looks_at
    statistics = Statistics(
        num_experts=experts,
        top_k=model.top_k,
        tokens=1000,
        layers={0: {name: made_up(name) for name in method.requires | looks_at}},
        n_group=model.family.router_groups(model.config),
        expert_weights=weights,
        router=router,
        router_rows=router_rows,
    )
    (layer,) = method.decide(statistics, ratio, seed).plan.layers
    stored = [new for new in layer.experts if new.sources]
    widths = tuple(width if new.channels is None else len(new.channels) for new in stored)
    hidden = config_integer(model.config, "hidden_size")
    standins = len(layer.experts) - len(widths)
    rank = method.rank_in(hidden) if standins and hasattr(method, "rank_in") else 0
    return Kept(widths, sum(new is not None for new in layer.route), standins, rank)


def compressed(model: Anatomy, kept: Kept, layout: str = "compact") -> Anatomy:
    """``model`` with ``kept`` in every MoE layer, as ``apply_plan`` stores it: experts of a stacked tensor are padded
    to the widest, and with ``layout`` "expanded" every router row has an expert of its own, all of one width."""
    family, hidden = model.family, config_integer(model.config, "hidden_size")
    if layout == "expanded" and kept.standins:
        raise WinnowError(NO_PLACE)
    widths = (max(kept.widths),) * (kept.rows if layout == "expanded" else len(kept.widths))
    if not family.stacks_experts and layout != "expanded":
        widths = kept.widths
    if layout == "vllm_constants":
        whole = set(kept.widths) == {model.width} and len(kept.widths) + kept.constants == model.num_experts
        if family.stacks_experts or not whole or kept.rows != model.num_experts:
            raise WinnowError(ONLY_CONSTANTS)
    shapes, sizes = dict(model.headers.shapes), dict(model.headers.bytes)

    def replace(old: Iterable[str], new: Mapping[str, tuple[int, ...]]) -> None:
        names = list(old)
        itemsize = sizes[names[0]] // prod(shapes[names[0]])
        for name in names:
            del shapes[name], sizes[name]
        shapes.update(new)
        sizes.update({name: prod(shape) * itemsize for name, shape in new.items()})

    stored = len(widths) + kept.standins
    route = tuple(row % stored for row in range(kept.rows))  # which row leads where does not change a size
    layout_now = LayerLayout(widths, route, kept.constants, kept.low_rank)
    if layout == "vllm_constants":
        layout_now = approximated_layout((model.width,) * kept.rows, range(len(widths), kept.rows))
    for layer, old in layer_layouts(model.config, family).items():
        first = family.expert_tensors[0].names(layer, 1)[0]
        itemsize = sizes[first] // prod(shapes[first])
        standins = standin_shapes(family, layer, layout_now, hidden)
        shapes.update(standins)
        sizes.update({name: prod(shape) * itemsize for name, shape in standins.items()})
        for tensor in family.expert_tensors:
            parts = [tensor.shape(width, hidden) for width in widths]
            new_shapes = [(len(parts), *parts[0])] if tensor.is_stacked else parts
            new_names = tensor.names(layer, layout_now.numbers)
            replace(tensor.names(layer, old.experts), dict(zip(new_names, new_shapes, strict=True)))
        for name in (template.format(layer=layer) for template in family.router_tensors):
            replace([name], {name: (kept.rows, *shapes[name][1:])})
        for name in (template.format(layer=layer) for template in family.router_biases):
            if name in shapes:
                replace([name], {name: (*shapes[name][:-1], kept.rows)})
    headers = Headers(shapes, sizes)
    layouts = dict.fromkeys(family.moe_layers(model.config), layout_now)
    return Anatomy(with_layouts(model.config, layouts), family, headers, min(model.largest_shard, headers.total_bytes))


def quantised_bytes(model: Anatomy, quantization: Quantization) -> int:
    """Bytes of the weights once ``quantization`` is through with them.

    Raises WinnowError where it does not fit.
    """
    quantization.check(model.family, model.config)
    schemes = quantization.schemes(model.headers, model.family, model.config)
    total = 0
    for name in model.headers.names():
        scheme = schemes.get(packed.kind_of(name))
        if scheme is None:
            total += model.headers.nbytes(name)
            continue
        outputs, inputs = model.headers.shape(name)
        item = {packed.SCALE: model.headers.nbytes(name) // (outputs * inputs), packed.SHAPE: 8}
        parts = packed.part_shapes(outputs, inputs, inputs // (scheme.group or inputs), scheme)
        total += sum(prod(shape) * item.get(part, 4) for part, shape in parts.items())  # int32 but for scale and shape
    return total


# --- memory ---------------------------------------------------------------------------------------------------------


def statistics_bytes(model: Anatomy, names: Iterable[str]) -> int:
    """MoE layers x every array of a layer (``frequency`` is always collected)."""
    hidden, vocabulary = (config_integer(model.config, key) for key in ("hidden_size", "vocab_size"))
    of_layer = sum(
        STATISTICS[name].itemsize
        * prod(STATISTICS[name].sizes(model.num_experts, hidden, model.width, vocabulary=vocabulary))
        for name in {*names, "frequency"}
    )
    return len(model.family.moe_layers(model.config)) * of_layer


def layer_bytes(model: Anatomy) -> int:
    """The largest decoder layer, as it is stored."""
    prefix, _, _ = model.family.block.partition("{layer}")
    layers: dict[str, int] = {}
    for name in model.headers.names():
        if name.startswith(prefix):
            layer = name.removeprefix(prefix).partition(".")[0]
            layers[layer] = layers.get(layer, 0) + model.headers.nbytes(name)
    return max(layers.values())


def embedding_bytes(model: Anatomy, itemsize: int) -> int:
    """Vocabulary x H x itemsize."""
    return config_integer(model.config, "vocab_size") * config_integer(model.config, "hidden_size") * itemsize


def activation_bytes(model: Anatomy, tokens: int, itemsize: int) -> int:
    """What a batch of ``tokens`` needs in the MoE layer where most is alive, at most.

    tokens x k x (2 I + 2 H) x itemsize for the activations of all routed pairs, twice the channels for coverage's
    scores, and their outputs; tokens x k x 2 H x 4 for the outputs times float32 gate values, twice while they are put
    in order; tokens x 4 H x 4 around the experts. Attention is assumed not to hold its scores (sdpa does not).
    """
    hidden = config_integer(model.config, "hidden_size")
    pair = (2 * model.width + 2 * hidden) * itemsize + 2 * hidden * 4
    return tokens * (model.top_k * pair + 4 * hidden * 4)


def expert_bytes_float32(model: Anatomy) -> int:
    """One expert as ``Statistics.expert_weights`` gives it: 3 H I x 4."""
    return 3 * config_integer(model.config, "hidden_size") * model.width * 4


def cache_bytes_per_token(model: Anatomy, itemsize: int) -> int:
    """What one token leaves in the cache (``Family.cached_elements``)."""
    return model.family.cached_elements(model.config) * itemsize
