"""Which experts a plan keeps, layer by layer: from ``cells/CELL/plan.json``, else from the layer diagnostics."""

import json
from pathlib import Path
from typing import Any

from harness.errors import WinnowError
from reports.numbers.diagnosed import read_diagnostics

Kept = dict[str, tuple[list[int], int]]  # layer -> the old experts that stay, and how many there were


def kept_experts(folder: Path, cell: str) -> Kept:
    """Empty where neither plan nor diagnostics are kept, and of plans that merge experts or only take channels.

    Raises WinnowError where the plan is damaged.
    """
    path = folder / "cells" / cell / "plan.json"
    if path.is_file():
        try:
            return _of_plan(json.loads(path.read_text(encoding="utf-8"))["layers"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise WinnowError(f"{path} is damaged") from error
    found = read_diagnostics(folder, cell)
    layers = {} if found is None else found["layers"]
    return {layer: (of["kept"], of["rows"]) for layer, of in layers.items() if of["kept"] is not None}


def _of_plan(layers: list[dict[str, Any]]) -> Kept:
    found: Kept = {}
    for layer in layers:
        route = layer["route"]
        kept = [old for old, new in enumerate(route) if new is not None and layer["experts"][new]["sources"]]
        merges = any(len(expert["sources"]) > 1 for expert in layer["experts"])
        if not merges and len(kept) < len(route):
            found[str(layer["layer"])] = (kept, len(route))
    return found


def jaccard(one: list[int], other: list[int]) -> float:
    """Shared experts over all that either keeps; 1 of two empty sets."""
    union = set(one) | set(other)
    return len(set(one) & set(other)) / len(union) if union else 1.0


def jaccard_by_chance(one: int, other: int, experts: int) -> float:
    """Of the expected numbers of shared and of all experts, where ``one`` and ``other`` of them are drawn at random."""
    shared = one * other / experts
    return shared / (one + other - shared)
