"""vLLM plugin (entry point ``vllm.general_plugins``): serves compact checkpoints at their true size.

vLLM builds every MoE layer from one config, so all its layers have the same number of experts and the same width, and
as many experts as router rows. A compact checkpoint has none of these (``harness.checkpoints.layout``). Two things that
every MoE model of vLLM builds per layer are made to ask the layout first, whatever the architecture:

- ``GateLinear``, the router's matrix: as many rows as the layer stores;
- ``FusedMoEFactory``, the experts: as many and as wide as stored. Where rows and experts differ, each chosen row is led
  to its stored expert, or to the constant or map that stands for one (``vllm_standins``); gate values of rows that
  share one then add up in the sum. The tensors of constants and maps are read from the checkpoint's folder as a layer
  is built, and kept from the models' own loaders, each of which has names of its own.

Checkpoints without a layout are built as ever. Experts narrower than their layer's widest are padded with zeros, which
adds nothing to their output (silu(0) * 0 = 0). So are, where several devices share an expert's channels (tensor
parallelism), widths that their number does not divide: vLLM cuts a narrower expert into equal parts and would leave
out the channels that remain.
"""

import functools
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # vLLM imports this module in all its processes: it stays cheap
    from harness.checkpoints.layout import LayerLayout

VERSIONS = ("0.32.",)
_MODELS = "vllm.model_executor.models."
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def register() -> None:
    """Called by vLLM in each of its processes, perhaps several times; does nothing on other versions of vLLM.

    A compact checkpoint on such a version is refused by ``harness.backends.vllm_guard`` before the engine starts.
    """
    import vllm

    if vllm.__version__.startswith(VERSIONS):
        _install()


def _install() -> None:
    from vllm.model_executor.layers import fused_moe

    if hasattr(fused_moe.FusedMoEFactory, "winnow"):
        return
    replacements = {"FusedMoEFactory": _factory(fused_moe.FusedMoEFactory), "GateLinear": _gate(fused_moe.GateLinear)}
    originals = {name: getattr(fused_moe, name) for name in replacements}
    users = [fused_moe, *(module for name, module in sys.modules.items() if name.startswith(_MODELS))]
    for module in users:
        for name, original in originals.items():
            if getattr(module, name, None) is original:
                setattr(module, name, replacements[name])
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from harness.backends.vllm_standins import as_built

    loader: Any = DefaultModelLoader
    loader.get_all_weights = as_built(loader.get_all_weights)


def _layout(prefix: str) -> "LayerLayout | None":
    """The layout of the layer that ``prefix`` lies in, None where the model has none."""
    from vllm.config import get_current_vllm_config

    from harness.checkpoints.layout import is_compact, layer_layouts
    from harness.families.table import family_of

    model_config = get_current_vllm_config().model_config
    found = _LAYER.search(prefix)
    if model_config is None or found is None:
        return None
    config = model_config.hf_text_config.to_dict()
    return layer_layouts(config, family_of(config)).get(int(found[1])) if is_compact(config) else None


def _gate(original: Any) -> Any:
    class GateLinear(original):  # type: ignore[misc]
        """A router matrix with the rows that the layout stores."""

        def __init__(self, input_size: int, output_size: int, *args: Any, prefix: str = "", **options: Any) -> None:
            layout = _layout(prefix)
            rows = output_size if layout is None else layout.rows
            super().__init__(input_size, rows, *args, prefix=prefix, **options)

        def __setattr__(self, name: str, value: Any) -> None:
            """Models that keep the correction bias here make it with the rows that config.json has."""
            if name == "e_score_correction_bias" and value is not None and len(value) != self.output_size:
                value = type(value)(value.data.new_empty(self.output_size))
            super().__setattr__(name, value)

    GateLinear.__name__ = GateLinear.__qualname__ = original.__name__
    return GateLinear


def _factory(original: Any) -> Any:
    from vllm.distributed import get_tensor_model_parallel_world_size

    @functools.wraps(original)
    def build(*args: Any, prefix: str = "", **options: Any) -> Any:
        layout = _layout(prefix)
        if layout is None:
            return original(*args, prefix=prefix, **options)
        if args or options.get("quant_config") is not None:
            raise ValueError("compact checkpoints are served with named arguments and without quantization only")
        if not layout.is_direct:
            options["router"] = _routed(options, layout)
            options["routed_experts_cls"] = _led(options.get("routed_experts_cls"), layout, prefix)
        devices = get_tensor_model_parallel_world_size()
        options |= {"num_experts": layout.experts, "intermediate_size": _multiple(layout.width, devices)}
        runner = original(prefix=prefix, **options)
        for parameter in runner.parameters():
            if parameter.dim() == 3:  # experts' matrices: what no tensor of the checkpoint fills must be zero
                parameter.data.zero_()
                parameter.weight_loader = _padding_loader(parameter.weight_loader, devices)
        return runner

    build.winnow = True  # type: ignore[attr-defined]
    return build


def _multiple(width: int, devices: int) -> int:
    """The least multiple of ``devices`` that holds ``width`` channels."""
    return -(-width // devices) * devices


def _padding_loader(original: Any, devices: int) -> Any:
    """vLLM's loader of one expert's matrix, given as many channels (with zeros) as the devices can share equally."""

    @functools.wraps(original)
    def load(param: Any, loaded_weight: Any, *name: Any, shard_id: str, **options: Any) -> Any:
        from torch.nn.functional import pad

        last = shard_id == "w2"  # the down projection [hidden, width]; the others are [width, hidden]
        width = loaded_weight.shape[1 if last else 0]
        more = _multiple(width, devices) - width
        if more:
            loaded_weight = pad(loaded_weight, (0, more) if last else (0, 0, 0, more))
        return original(param, loaded_weight, *name, shard_id=shard_id, **options)

    return load


def _led(base: Any, layout: "LayerLayout", prefix: str) -> Any:
    """vLLM's experts, led by ``layout``, with what stands for others."""
    from pathlib import Path

    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from harness.backends.vllm_standins import Route, StandIns, led
    from harness.checkpoints.hub import resolve_checkpoint
    from harness.families.table import family_of

    config = get_current_vllm_config()
    device, model = config.device_config.device, config.model_config
    dtype: Any = model.dtype
    standins, found = None, _LAYER.search(prefix)
    if found is not None and layout.has_standins and get_tensor_model_parallel_rank() == 0:
        folder, family = resolve_checkpoint(model.model), family_of(model.hf_text_config.to_dict())
        standins = StandIns(Path(folder), family, int(found[1]), layout, dtype, device)
    return led(base or RoutedExperts, Route(layout, device), standins)


def _routed(options: dict[str, Any], layout: "LayerLayout") -> Any:
    """vLLM's own router over the stored rows, which no kernel that routes by itself takes the place of."""
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    names = (
        "top_k", "renormalize", "use_grouped_topk", "num_expert_group", "topk_group", "scoring_func",
        "routed_scaling_factor", "e_score_correction_bias", "custom_routing_function",
    )  # fmt: skip
    chosen = {name: options[name] for name in names if name in options}
    if options.get("apply_routed_scale_to_output"):
        chosen["routed_scaling_factor"] = 1.0
    rows: Any = create_fused_moe_router(global_num_experts=layout.rows, **chosen)

    class RowRouter(BaseRouter):
        @property
        def routing_method_type(self) -> Any:
            return RoutingMethodType.Custom  # no kernel that routes by itself knows where rows lead

        def _compute_routing(
            self, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> Any:
            return rows._compute_routing(hidden_states, router_logits, indices_type, input_ids=input_ids)

    return RowRouter(top_k=options["top_k"], global_num_experts=layout.rows)
