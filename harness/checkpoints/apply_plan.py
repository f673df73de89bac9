"""Apply a CompressionPlan to a checkpoint folder, shard by shard, without ever holding the model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import config_integer, read_config
from harness.checkpoints.experts import expert_part, router_biases, widened
from harness.checkpoints.layout import (
    APPROXIMATE,
    LayerLayout,
    LowRankLayout,
    approximated_layout,
    is_compact,
    layer_layouts,
    with_layouts,
)
from harness.checkpoints.packed_weights import SECTION as QUANTISED
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.sizes import checkpoint_sizes
from harness.checkpoints.standins import NO_PLACE, ONLY_CONSTANTS, standin_arrays
from harness.checkpoints.writer import WITH_ARRAYS, Output, copy_companions, write_shards, written_atomically
from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert, Source, validate
from harness.contracts.plan_files import plan_arrays, plan_files
from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of
from harness.families.tensors import ExpertTensor
from harness.files import write_files

Layout = Literal["compact", "expanded", "vllm_constants"]
_SUM_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class _StoredLayer:
    """One layer as it will be written: ``rows`` are old router rows, ``experts`` in their stored order.

    The tensors of stored expert i go to the shard that holds the old expert ``homes[i]``. ``router`` (rows, H), where
    there is one, stands in the place of the router's ``rows``. ``standins`` are the constants, then the maps.
    """

    rows: tuple[int, ...]
    experts: tuple[NewExpert, ...]
    homes: tuple[int, ...]
    layout: LayerLayout
    router: torch.Tensor | None = None
    standins: tuple[NewExpert, ...] = ()


def apply_plan(
    source: Path,
    plan: CompressionPlan,
    target: Path,
    layout: Layout = "compact",
    lower_top_k: bool = False,
) -> dict[str, Any]:
    """Write ``source`` compressed by ``plan`` to the folder ``target``.

    Plain where every layer is pruned to the same number of experts and all experts to the same width (and where
    the plan is the identity); otherwise compact, or with ``layout="expanded"`` plain again by writing a copy of a
    merged expert for each of its router rows and padding all experts with zeros to the widest. Where the checkpoint
    stacks the experts of a layer in one tensor, they are padded to the widest of the layer in any layout.
    ``layout="vllm_constants"`` is how vLLM's main branch stores constants (``harness.checkpoints.layout``), and takes
    no other plan. A source alone with weight 1 is copied bit by bit; sums are computed in float32 (float64 where the
    tensors are stored in float32) and rounded once to the stored dtype.

    With ``lower_top_k`` a layer may keep fewer router rows than the model chooses a token, which then chooses as many
    as every layer has; otherwise such a plan is refused.

    Holds what is new in one shard and one matrix in the making; what is only copied stays on disk. ``target``
    appears when it is complete; an existing checkpoint there is replaced. A folder that a killed process left
    beside it is removed.

    Returns ``checkpoint_sizes`` of the target, those of the source with ``_before`` appended, and ``layout``:
    "plain", "compact" or "vllm_constants". Raises WinnowError where plan and checkpoint do not fit, or the target
    cannot be written.
    """
    source, target = Path(source), Path(target)
    if layout not in get_args(Layout):
        raise WinnowError(f"unknown layout '{layout}': choose compact, expanded or vllm_constants")
    config = read_config(source)
    family = family_of(config)
    if is_compact(config):
        raise WinnowError(f"{source} is already compressed (compact): apply the plan to the original model")
    if QUANTISED in config:
        raise WinnowError(f"{source} is quantised: apply the plan to the unquantised model")
    if target.resolve() == source.resolve():
        raise WinnowError(f"the compressed model cannot replace its source {source}: choose another folder")
    check_checkpoint(source, family, config)
    reader = CheckpointReader(source)
    old = layer_layouts(config, family)
    shape = family.shape(family.with_top_k(config, 1) if lower_top_k else config)
    _check_layers(plan, old)
    validate(plan, shape.num_experts, shape.width, config_integer(config, "hidden_size"))
    if layout == "vllm_constants":
        layers = {layer.layer: _with_old_numbers(layer, old[layer.layer], family) for layer in plan.layers}
    else:
        layers = _stored_layers(plan, old, shape, layout == "expanded")
    rows = min(stored.layout.rows for stored in layers.values())
    chosen = config if rows >= family.top_k(config) else family.with_top_k(config, rows)
    new_config = _new_config(chosen, family, layers, layout == "expanded")
    shards = _outputs_by_shard(reader, family, old, layers)
    with written_atomically(target) as folder:
        (folder / "config.json").write_text(json.dumps(new_config, indent=2) + "\n")
        _write_plan(plan, folder)
        copy_companions(source, folder)
        write_shards(folder, shards, written=reader.let_go)
        sizes = checkpoint_sizes(folder)
    before = {f"{key}_before": value for key, value in checkpoint_sizes(source).items()}
    written = "plain" if not is_compact(new_config) else "vllm_constants" if APPROXIMATE in new_config else "compact"
    return {"layout": written, **sizes, **before}


def _write_plan(plan: CompressionPlan, folder: Path) -> None:
    """Beside the weights; arrays in a folder of their own, as engines take every safetensors file for weights."""
    arrays = plan_arrays(plan)
    write_files(plan_files(plan, folder / WITH_ARRAYS if arrays else folder))


def _check_layers(plan: CompressionPlan, old: Mapping[int, LayerLayout]) -> None:
    named = sorted(layer.layer for layer in plan.layers)
    if named != sorted(old):
        raise WinnowError(f"the plan is for layers {named}, but the MoE layers of the model are {sorted(old)}")


def _stored_layers(
    plan: CompressionPlan, old: Mapping[int, LayerLayout], shape: MoeShape, expanded: bool
) -> dict[int, _StoredLayer]:
    by_index = sorted(plan.layers, key=lambda layer: layer.layer)
    layers = {layer.layer: _stored_layer(layer, old[layer.layer], shape, expanded) for layer in by_index}
    if not expanded and not shape.one_width:
        return layers
    widest = max(stored.layout.width for stored in layers.values())  # a plain checkpoint has one width
    return {
        layer: replace(stored, layout=stored.layout.padded_to(widest if expanded else stored.layout.width))
        for layer, stored in layers.items()
    }


def stored_rows(plan: LayerPlan) -> tuple[int, ...]:
    """The router rows that stay, by their old numbers, as they are written.

    A layer that is only pruned is an ordinary one, once its rows stand in the order of its experts.
    """
    kept = [(row, new) for row, new in enumerate(plan.route) if new is not None]
    if plan.is_pruning and not _has_standins(plan):
        kept.sort(key=lambda pair: pair[1])
    return tuple(row for row, _ in kept)


def _has_standins(plan: LayerPlan) -> bool:
    return any(expert.constant is not None or expert.low_rank is not None for expert in plan.experts)


def _stored_layer(plan: LayerPlan, old: LayerLayout, shape: MoeShape, expanded: bool) -> _StoredLayer:
    if _has_standins(plan):
        if expanded:
            raise WinnowError(NO_PLACE)
        return _with_standins(plan, old, shape)
    rows = stored_rows(plan)
    route = tuple(new for row in rows if (new := plan.route[row]) is not None)
    _check_rows(rows, f"plan, layer {plan.layer}", shape)
    experts, homes = plan.experts, tuple(expert.sources[0].expert for expert in plan.experts)
    if expanded:
        experts, homes, route = tuple(experts[new] for new in route), rows, tuple(range(len(rows)))
    widths = tuple(old.width if e.channels is None else len(e.channels) for e in experts)
    return _StoredLayer(rows, experts, homes, LayerLayout(widths, route), _router(plan, rows))


def _with_standins(plan: LayerPlan, old: LayerLayout, shape: MoeShape) -> _StoredLayer:
    """Of a layer in which something stands for experts: rows stay in their order, and equal bases are stored once."""
    experts = range(len(plan.experts))
    constants = [index for index in experts if plan.experts[index].constant is not None]
    maps = [index for index in experts if plan.experts[index].low_rank is not None]
    combinations = [index for index in experts if index not in constants and index not in maps]
    stored = [plan.experts[index] for index in combinations]
    low_rank = []
    for new, low in ((plan.experts[index], plan.experts[index].low_rank) for index in maps):
        base = replace(new, low_rank=None)
        if new.sources and base not in stored:
            stored.append(base)
        assert low is not None
        low_rank.append(LowRankLayout(low.rank, stored.index(base) if new.sources else None, low.shift is not None))
    rows = stored_rows(plan)
    _check_rows(rows, f"plan, layer {plan.layer}", shape)
    place = {index: number for number, index in enumerate(combinations)}
    place |= {index: len(stored) + number for number, index in enumerate([*constants, *maps])}
    route = tuple(place[new] for new in plan.route if new is not None)
    widths = tuple(old.width if new.channels is None else len(new.channels) for new in stored)
    layout = LayerLayout(widths, route, len(constants), tuple(low_rank))
    homes = tuple(new.sources[0].expert for new in stored)
    standins = tuple(plan.experts[index] for index in (*constants, *maps))
    return _StoredLayer(rows, tuple(stored), homes, layout, _router(plan, rows), standins)


def _with_old_numbers(plan: LayerPlan, old: LayerLayout, family: Family) -> _StoredLayer:
    """Of a layer of whole experts and constants, each in its old row, as vLLM stores it."""
    experts = [plan.experts[new] if new is not None else None for new in plan.route]
    gone = [row for row, expert in enumerate(experts) if expert is not None and expert.constant is not None]
    whole = [NewExpert((Source(row),)) for row in range(len(experts)) if row not in gone]
    if family.stacks_experts or whole != [expert for row, expert in enumerate(experts) if row not in gone]:
        raise WinnowError(f"plan, layer {plan.layer}: {ONLY_CONSTANTS}")
    rows = tuple(range(len(experts)))
    homes = tuple(expert.sources[0].expert for expert in whole)
    standins = tuple(expert for row, expert in enumerate(experts) if row in gone and expert is not None)
    return _StoredLayer(rows, tuple(whole), homes, approximated_layout(old.widths, gone), _router(plan, rows), standins)


def _router(plan: LayerPlan, rows: tuple[int, ...]) -> torch.Tensor | None:
    """What the plan has for ``rows``, in their order."""
    if plan.router is None:
        return None
    places = np.argsort(np.argsort(rows))
    return torch.from_numpy(plan.router.values[places])


def _check_rows(rows: tuple[int, ...], where: str, shape: MoeShape) -> None:
    """Enough rows for the router, and as many in each of its groups, which stay together."""
    left = f"{where}: {len(rows)} router rows are left, but the model selects {shape.top_k} a token"
    if len(rows) < shape.top_k:
        raise WinnowError(left)
    if len(rows) < shape.fewest_rows:
        raise WinnowError(f"{left} in {shape.n_group} router groups: it needs {shape.fewest_rows}")
    share = shape.num_experts // shape.n_group
    group_of = [row // share for row in rows]
    size = len(rows) // shape.n_group
    blocks = [set(group_of[start : start + size]) for start in range(0, len(rows), size)]
    if len(blocks) != shape.n_group or any(len(block) > 1 for block in blocks) or len(set(group_of)) < shape.n_group:
        counts = ", ".join(str(group_of.count(group)) for group in range(shape.n_group))
        raise WinnowError(
            f"{where}: the {shape.n_group} router groups must keep the same number of rows, side by side, not {counts}"
        )


def _new_config(
    config: Mapping[str, Any], family: Family, layers: Mapping[int, _StoredLayer], expanded: bool
) -> dict[str, Any]:
    layouts = {layer: stored.layout for layer, stored in layers.items()}
    counts = sorted({layout.experts for layout in layouts.values()})
    widths = {width for layout in layouts.values() for width in layout.widths}
    if len(counts) == len(widths) == 1 and all(layout.is_direct for layout in layouts.values()):
        width = widths.pop()
        plain = family.with_width(family.with_num_experts(config, counts[0]), width)
        if plain is not None:
            return plain
        if expanded:
            raise WinnowError(
                f"layout=expanded cannot say that routed experts have {width} channels, because the width of the "
                f"shared expert hangs on {family.width_key}: use layout=compact"
            )
    if expanded:
        raise WinnowError(
            "layout=expanded needs the same number of router rows in every layer, but this plan leaves "
            f"{' or '.join(map(str, counts))}: use layout=compact"
        )
    return with_layouts(config, layouts)


def _outputs_by_shard(
    reader: CheckpointReader,
    family: Family,
    old: Mapping[int, LayerLayout],
    layers: Mapping[int, _StoredLayer],
) -> list[list[Output]]:
    """What every output shard will hold: a tensor stays in the shard that it, or its home expert, was in."""
    shards: dict[Path, list[Output]] = {path: [] for path in reader.files}
    replaced: set[str] = set()

    def selection(name: str, axis: int, rows: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        return lambda: reader.tensor(name).index_select(axis, torch.tensor(rows))

    def new_part(layer: int, tensor: ExpertTensor, expert: NewExpert, width: int) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            old_width = old[layer].width
            part = _fitted(expert, tensor, expert_part(reader, tensor, layer, expert.sources[0].expert).dtype)
            if part is None:
                part = _part(expert, lambda e: expert_part(reader, tensor, layer, e), tensor, old_width)
            return widened(part, tensor, old_width if expert.channels is None else len(expert.channels), width)

        return make

    def given(name: str, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: values.to(reader.tensor(name).dtype)

    def same(name: str) -> Callable[[], torch.Tensor]:
        return lambda: reader.tensor(name)

    def add(output: Output, home: str) -> None:
        shards[reader.file_of(home)].append(output)

    for layer, stored in layers.items():
        matrices = [(template.format(layer=layer), 0) for template in family.router_tensors]
        for name, axis in [*matrices, *((name, -1) for name in router_biases(reader, family, layer))]:
            replaced.add(name)
            new_rows = stored.router if axis == 0 else None
            make = selection(name, axis, stored.rows) if new_rows is None else given(name, new_rows)
            add(Output(name, name, make), name)
        first_router = family.router_tensors[0].format(layer=layer)
        for name, make in _standins(stored, family, layer, reader).items():
            add(Output(name, name, make), first_router)
        for place, tensor in enumerate(family.expert_tensors):
            old_names = tensor.names(layer, old[layer].experts)
            replaced.update(old_names)
            sized = list(zip(stored.experts, stored.layout.widths, strict=True))
            parts = [new_part(layer, tensor, expert, width) for expert, width in sized]
            if tensor.is_stacked:
                add(Output(old_names[0], old_names[0], _stacked(parts)), old_names[0])
                continue
            names = tensor.names(layer, stored.layout.numbers)
            for name, (expert, _), home, part in zip(names, sized, stored.homes, parts, strict=True):
                add(Output(name, (layer, place, expert), part), old_names[home])
    for name in reader.names():
        if name not in replaced:
            shards[reader.file_of(name)].append(Output(name, name, same(name)))
    return [outputs for outputs in shards.values() if outputs]


def _standins(
    stored: _StoredLayer, family: Family, layer: int, reader: CheckpointReader
) -> dict[str, Callable[[], torch.Tensor]]:
    """The tensors of a layer's constants and maps, in the dtype of its experts."""
    if not stored.standins:
        return {}
    dtype = expert_part(reader, family.expert_tensors[0], layer, 0).dtype
    found = standin_arrays(stored.standins, family, layer, stored.layout)

    def made(values: np.ndarray) -> Callable[[], torch.Tensor]:
        return lambda: torch.from_numpy(values).to(dtype)

    return {name: made(values) for name, values in found.items()}


def _fitted(expert: NewExpert, tensor: ExpertTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The fitted down projection in the order of ``tensor``'s axes, where the expert has one and it belongs there."""
    if expert.down is None or tensor.matrices != ("down",) or tensor.is_bias:
        return None
    down = torch.from_numpy(expert.down.values).to(dtype)
    return down if tensor.axes == ("hidden", "channel") else down.T


def _stacked(parts: list[Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    """The parts of all experts along a new first dimension, of which one at a time is made."""

    def make() -> torch.Tensor:
        first = parts[0]()
        whole = first.new_empty((len(parts), *first.shape))
        whole[0] = first
        for index, part in enumerate(parts[1:], start=1):
            whole[index] = part()
        return whole

    return make


def _part(expert: NewExpert, read: Callable[[int], torch.Tensor], tensor: ExpertTensor, old_width: int) -> torch.Tensor:
    """What ``tensor`` holds of a new expert, from what it holds of its sources, which have ``old_width`` channels."""
    axis = tensor.channel_axis

    def arranged(expert_index: int, permutation: tuple[int, ...] | None) -> torch.Tensor:
        order = permutation
        if expert.channels is not None:  # select before summing: the same numbers for less memory
            order = tuple(c if permutation is None else permutation[c] for c in expert.channels)
        part = read(expert_index)
        if order is None or axis is None:
            return part
        return part.index_select(axis, torch.tensor(tensor.places(order, old_width)))

    first = expert.sources[0]
    if len(expert.sources) == 1 and first.weight == 1.0:
        return arranged(first.expert, first.permutation)
    part = arranged(first.expert, first.permutation)
    stored_dtype = part.dtype
    if stored_dtype not in _SUM_DTYPE:
        raise WinnowError(f"experts stored as {stored_dtype} cannot be summed: use an unquantised checkpoint")
    total = torch.zeros(part.shape, dtype=_SUM_DTYPE[stored_dtype])
    for source in expert.sources:
        total.add_(arranged(source.expert, source.permutation).to(total.dtype), alpha=source.weight)
    return total.to(stored_dtype)
