"""A transformers model built with what its checkpoint stores: numbers of experts, widths, routes and thresholds.

For who loads the weights, all at once (``load``) or a layer at a time (``by_layer``).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist

from harness.checkpoints import standins
from harness.checkpoints.experts import padded
from harness.checkpoints.layout import LayerLayout
from harness.checkpoints.skipping import install as install_skipping
from harness.errors import WinnowError, first_line
from harness.families.family import Family
from harness.families.moe_block import moe_block, moe_block_of, replace_experts


def heed_layouts(
    model: PreTrainedModel,
    family: Family,
    layouts: Mapping[int, LayerLayout],
    betas: Mapping[int, float],
    folder: Path,
    experts_implementation: str | None = None,
) -> None:
    """Routers lead to the stored experts, and to what stands for others (read from ``folder``), and leave out those
    below ``betas``; the experts' matrix products are such as run with the stored widths.

    ``experts_implementation`` is what was asked for, None for the default. Raises WinnowError where it cannot run.
    """
    for layer, layout in layouts.items():
        if layout.has_standins:
            experts = moe_block(model, family, layer).experts
            standins.install(experts, folder, family, layer, layout, model.dtype, _device(experts))
        elif not layout.is_direct:
            _install_route(moe_block(model, family, layer).experts, layout.route)
    install_skipping(model, family, betas)
    if not _grouped_mm_runs(model.dtype, layouts) and model.config._experts_implementation == "grouped_mm":
        if experts_implementation is not None:
            raise WinnowError(
                f"experts_implementation=grouped_mm cannot run {model.dtype} experts of "
                f"{sorted({layout.width for layout in layouts.values()})} channels: choose eager"
            )
        model.set_experts_implementation("eager")


@contextmanager
def loading_faults(folder: Path) -> Iterator[None]:
    """What transformers raises meanwhile becomes a WinnowError that names ``folder``."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise WinnowError(f"cannot load the model {folder}: {first_line(error)}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, IndexError) as error:
        # transformers looks names up in tables of its own, and counts with sizes, without a word where they are wrong
        raise WinnowError(
            f"cannot load the model {folder}: transformers does not take its config.json "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raises WinnowError where the loading report of transformers names a fault."""
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if report[fault]:
            some = ", ".join(str(key) for key in sorted(report[fault], key=str)[:3])
            raise WinnowError(f"{folder} does not fit its config.json: {len(report[fault])} {fault}, such as {some}")


def _grouped_mm_runs(dtype: torch.dtype, layouts: Mapping[int, LayerLayout]) -> bool:
    """torch.nn.functional.grouped_mm knows no float64, and wants rows of whole 16 bytes."""
    aligned = all(layout.width * dtype.itemsize % 16 == 0 for layout in layouts.values())
    return aligned and dtype != torch.float64


@contextmanager
def layers_built_as_stored(family: Family, layouts: Mapping[int, LayerLayout]) -> Iterator[None]:
    """Meanwhile decoder layers are built with the numbers of experts, rows and channels in ``layouts``.

    The config is changed only while a layer is built and stays the one object that all modules share, so that
    a later ``set_attn_implementation`` or ``set_experts_implementation`` reaches every layer.
    """
    layer_class: Any = family.decoder_layer_class()
    original = layer_class.__init__

    def build(self: torch.nn.Module, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        layout = layouts.get(layer_idx)
        if layout is None:
            return original(self, config, layer_idx, *args, **kwargs)
        plain_width = getattr(config, family.width_key)
        with _sizes_in(config, family, layout.rows, plain_width):
            original(self, config, layer_idx, *args, **kwargs)
        if (layout.experts, layout.width) != (layout.rows, plain_width):
            # rows are everywhere in a block, and its shared experts may have the width of plain routed ones
            donor = layer_class.__new__(layer_class)
            with _sizes_in(config, family, layout.experts, layout.width):
                original(donor, config, layer_idx, *args, **kwargs)
            replace_experts(self, moe_block_of(donor, family).experts, family)

    layer_class.__init__ = build
    try:
        yield
    finally:
        layer_class.__init__ = original


@contextmanager
def experts_padded_where_ragged(layouts: Mapping[int, LayerLayout]) -> Iterator[None]:
    """Meanwhile transformers pads the matrices of a layer's experts to the widest before it stacks them.

    It does so as it reads, a stack at a time. That every expert has the width its layout gives is for
    ``check_checkpoint`` to say, and that the widest is the layer's for the comparison with the built model.
    """
    stacking: Any = MergeModulelist
    original = stacking.convert

    def convert(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for matrices in input_dict.values():
            rows, columns = (max(matrix.shape[dim] for matrix in matrices) for dim in (0, 1))
            for index, matrix in enumerate(matrices):
                matrices[index] = padded(matrix, rows, columns)
        return original(self, input_dict, *args, **kwargs)

    if any(layout.is_ragged for layout in layouts.values()):
        stacking.convert = convert
    try:
        yield
    finally:
        stacking.convert = original


@contextmanager
def standins_left_to_us() -> Iterator[None]:
    """Meanwhile transformers does not wonder at the tensors of constants and low-rank maps, which it does not know."""
    model_class: Any = PreTrainedModel
    original = model_class._adjust_missing_and_unexpected_keys

    def adjust(self: Any, loading_info: Any) -> Any:
        done = original(self, loading_info)
        ours = {name for name in loading_info.unexpected_keys if standins.IS_ONE.search(name)}
        loading_info.unexpected_keys -= ours
        return done

    model_class._adjust_missing_and_unexpected_keys = adjust
    try:
        yield
    finally:
        model_class._adjust_missing_and_unexpected_keys = original


@contextmanager
def _sizes_in(config: Any, family: Family, experts: int, width: int) -> Iterator[None]:
    wanted = {**dict.fromkeys(family.num_experts_keys, experts), family.width_key: width}
    before = {key: getattr(config, key) for key in wanted if hasattr(config, key)}
    try:
        for key in before:
            setattr(config, key, wanted[key])
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def _device(experts: torch.nn.Module) -> torch.device:
    parameter = next(experts.parameters())
    return torch.device("cpu") if parameter.is_meta else parameter.device  # meta: offloaded until its turn comes


def _install_route(experts: torch.nn.Module, route: tuple[int, ...]) -> None:
    """Lead the router's indices to the stored experts; gate values of one expert then add up in the sum."""
    experts.register_buffer("route", torch.tensor(route, device=_device(experts)), persistent=False)

    def follow(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, indices, gates = args
        return hidden_states, module.route.to(indices.device)[indices], gates

    experts.register_forward_pre_hook(follow)
