"""The panel: reference MoEs trained by the shipped model's recipe with one thing changed each.

The table was written before any of them was trained, and all of them are reported: a conclusion that holds on one
model may be about that model.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import WinnowError
from harness.reference import MODEL_FOLDER
from harness.reference.recipe import Recipe

# Weights and states of training, ignored by git; the DeepSeek-style model is the only one that is committed.
PANEL_FOLDER = Path(".panel")
LOG_FOLDER = Path("results/reference_model")


@dataclass(frozen=True)
class Variant:
    """``changes``: fields of the recipe. ``committed``: the folder beside the shipped model that keeps the weights."""

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    committed: str | None = None


VARIANTS: dict[str, Variant] = {
    "deepseek": Variant(
        "DeepSeek-V3's architecture: sigmoid router with correction bias, groups, a shared expert, first layer dense",
        # 64 experts in each of five layers: about as many in all as the shipped model's 128 in each of two.
        {"family": "deepseek_v3", "dense_layers": (0,), "num_experts": 64},
        committed="model_deepseek",
    ),
    "coarse": Variant(
        "a quarter of the experts, four times as wide", {"num_experts": 32, "expert_width": 128, "top_k": 2}
    ),
    # A chunk's documents are drawn from seed + 1 + chunk: seeds lie far apart, or two models would share documents.
    "seed1": Variant("another seed", {"seed": 1000}),
    "all_mixtures": Variant("no dense layer", {"dense_layers": ()}),
    "balanced": Variant("balancing loss a hundred times as heavy", {"balance": 1e-2}),
    "few_shot": Variant("up to three solved examples in the prompt", {"shots": 3}),
    "seed2": Variant("another seed", {"seed": 2000}),
}


def recipe_of(name: str) -> Recipe:
    """Raises WinnowError where there is no such variant."""
    if name not in VARIANTS:
        raise WinnowError(f"unknown variant '{name}' of the reference MoE; known: {', '.join(VARIANTS)}")
    return replace(Recipe(), **VARIANTS[name].changes)


def weights_folder(name: str) -> Path:
    """Where the finished model of a variant lies, or will."""
    committed = VARIANTS[name].committed
    return MODEL_FOLDER.with_name(committed) if committed else PANEL_FOLDER / name / "model"


def panel_model(name: str) -> str:
    """The folder of a variant's weights, for records relative to the working folder where it lies below it.

    Raises WinnowError where the variant is unknown or its weights are not there, with the command that makes them.
    """
    recipe_of(name)
    path = weights_folder(name)
    if not (path / "config.json").exists():
        raise WinnowError(
            f"the weights of the panel's model '{name}' are not at {path}: "
            f"train it with python -m harness.reference.train --variant {name}"
        )
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
