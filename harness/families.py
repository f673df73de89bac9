"""The family table: where routers and experts live in each architecture. Nothing else asks which one it is looking at.

To add an architecture, add a row to ``FAMILIES`` and a tiny model of it to ``tests/tiny.py``.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import WinnowError


@dataclass(frozen=True)
class Family:
    """One architecture.

    In memory (transformers 5): ``block`` is the module path of the MoE block of a decoder layer; ``router`` and
    ``experts`` are attributes of it; the router returns (logits, gate values, indices) in the places that
    ``router_output`` names; experts hold fused ``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I).
    On disk: ``expert_tensors`` gives the name of one expert's gate, up and down matrix, ``router_tensors`` those
    whose first dimension is the expert. ``*_key`` are the names in config.json (the number of experts goes by either
    of two: published Qwen3-MoE configs say ``num_experts``, transformers 5 writes ``num_local_experts``).
    """

    model_type: str
    decoder_layer: str
    router_kind: str
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    n_group_key: str | None = None
    block: str = "model.layers.{layer}.mlp"
    router: str = "gate"
    experts: str = "experts"
    router_output: tuple[str, str, str] = ("logits", "gates", "indices")
    expert_tensors: tuple[str, str, str] = (
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    )
    router_tensors: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)

    def decoder_layer_class(self) -> type:
        module, name = self.decoder_layer.rsplit(".", 1)
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)

    def num_experts(self, config: Mapping[str, Any]) -> int:
        for key in self.num_experts_keys:
            if key in config:
                return int(config[key])
        raise WinnowError(f"config.json of a {self.model_type} model has none of {', '.join(self.num_experts_keys)}")

    def router_groups(self, config: Mapping[str, Any]) -> int:
        """The number of groups of a group-limited router, 1 for any other."""
        return int(config.get(self.n_group_key) or 1) if self.n_group_key else 1

    def with_num_experts(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The config with every key for the number of experts set to ``count``."""
        return {key: count if key in self.num_experts_keys else value for key, value in config.items()}

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Indices of the decoder layers that are MoE layers (some models have dense ones in between)."""
        dense = set(config.get("mlp_only_layers") or ())
        step = config.get("decoder_sparse_step") or 1
        return [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "qwen3_moe",
            "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer",
            "softmax, renormalised by config",
        ),
        Family(
            "olmoe",
            "olmoe.modeling_olmoe.OlmoeDecoderLayer",
            "softmax, renormalised by config (off as released)",
            width_key="intermediate_size",
        ),
        Family(
            "mixtral",
            "mixtral.modeling_mixtral.MixtralDecoderLayer",
            "softmax, always renormalised",
            width_key="intermediate_size",
            expert_tensors=(
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            ),
            router_tensors=("model.layers.{layer}.block_sparse_moe.gate.weight",),
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises WinnowError for an architecture without a row."""
    model_type = config.get("model_type", "(none)")
    if model_type not in FAMILIES:
        raise WinnowError(
            f"architecture '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "To add it, add a row to FAMILIES in harness/families.py"
        )
    return FAMILIES[model_type]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises WinnowError where it is missing or not JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WinnowError(f"no model at {folder}: there is no config.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WinnowError(f"{path} is not valid JSON: {error}") from error
