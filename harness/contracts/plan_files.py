"""A CompressionPlan on disk: ``plan.json``, and ``plan.safetensors`` beside it where the plan has arrays.

In the JSON an expert has, beside ``sources`` and ``channels``, a key ``constant`` or ``down`` with the name of the
array, or ``low_rank`` with the names of its factors. Names are ``layers.L.experts.N.constant`` (``.down``, ``.left``,
``.right``, ``.shift``) for new expert N of layer L. A layer with router rows of its own has a key ``router`` with the
name ``layers.L.router``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from harness.contracts.plan import (
    Array,
    CompressionPlan,
    LayerPlan,
    LowRank,
    NewExpert,
    Source,
    validate,
)
from harness.errors import WinnowError

PLAN, ARRAYS = "plan.json", "plan.safetensors"


def plan_files(plan: CompressionPlan, folder: Path) -> dict[Path, bytes]:
    """What ``load_plan`` reads from ``folder``."""
    arrays = plan_arrays(plan)
    files = {folder / PLAN: (json.dumps(plan_to_json(plan)) + "\n").encode()}
    return files | ({folder / ARRAYS: save(arrays)} if arrays else {})


def load_plan(path: Path) -> CompressionPlan:
    """The plan in the file ``path``, with the arrays beside it. Raises WinnowError where it is not a valid plan."""
    try:
        data = json.loads(path.read_text())
        beside = path.with_suffix(".safetensors")
        arrays = load(beside.read_bytes()) if beside.is_file() else {}
        return plan_from_json(data, arrays)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise WinnowError(f"cannot read the plan {path}: {error}") from error


def plan_fingerprint(plan: CompressionPlan) -> str:
    """A sha256 of everything in the plan."""
    digest = hashlib.sha256(json.dumps(plan_to_json(plan)).encode())
    for name, values in plan_arrays(plan).items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def plan_arrays(plan: CompressionPlan) -> dict[str, np.ndarray]:
    """The arrays of the plan by their names in its JSON."""
    named: dict[str, np.ndarray] = {}
    for layer in plan.layers:
        for index, expert in enumerate(layer.experts):
            named |= {_name(layer.layer, index, kind): array.values for kind, array in _arrays(expert).items()}
        if layer.router is not None:
            named[f"layers.{layer.layer}.router"] = layer.router.values
    return named


def plan_to_json(plan: CompressionPlan) -> dict[str, Any]:
    return {"layers": [_layer_to_json(layer) for layer in plan.layers]}


def plan_from_json(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> CompressionPlan:
    """Raises WinnowError where ``data`` is not a valid plan, or an array that it names is not there."""
    try:
        plan = CompressionPlan(tuple(_layer_from_json(layer, arrays or {}) for layer in data["layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WinnowError(f"not a compression plan: {type(error).__name__}: {error}") from error
    validate(plan)
    return plan


def _name(layer: int, expert: int, kind: str) -> str:
    return f"layers.{layer}.experts.{expert}.{kind}"


def _arrays(expert: NewExpert) -> dict[str, Array]:
    named = {"down": expert.down, "constant": expert.constant}
    if expert.low_rank is not None:
        named |= {"left": expert.low_rank.left, "right": expert.low_rank.right, "shift": expert.low_rank.shift}
    return {kind: array for kind, array in named.items() if array is not None}


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "layer": layer.layer,
        "experts": [_expert_to_json(layer.layer, index, expert) for index, expert in enumerate(layer.experts)],
        "route": list(layer.route),
    }
    return entry if layer.router is None else entry | {"router": f"layers.{layer.layer}.router"}


def _expert_to_json(layer: int, index: int, expert: NewExpert) -> dict[str, Any]:
    def source(s: Source) -> dict[str, Any]:
        entry: dict[str, Any] = {"expert": s.expert, "weight": s.weight}
        return entry if s.permutation is None else entry | {"permutation": list(s.permutation)}

    entry: dict[str, Any] = {
        "sources": [source(s) for s in expert.sources],
        "channels": None if expert.channels is None else list(expert.channels),
    }
    names = {kind: _name(layer, index, kind) for kind in _arrays(expert)}
    entry |= {kind: names[kind] for kind in ("down", "constant") if kind in names}
    factors = {kind: names[kind] for kind in ("left", "right", "shift") if kind in names}
    return entry | ({"low_rank": factors} if factors else {})


def _layer_from_json(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LayerPlan:
    return LayerPlan(
        layer=int(data["layer"]),
        experts=tuple(_expert_from_json(expert, arrays) for expert in data["experts"]),
        route=tuple(None if r is None else int(r) for r in data["route"]),
        router=_array(data.get("router"), arrays),
    )


def _expert_from_json(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> NewExpert:
    def indices(values: Sequence[int] | None) -> tuple[int, ...] | None:
        return None if values is None else tuple(int(v) for v in values)

    def array(name: str | None) -> Array | None:
        return _array(name, arrays)

    low = data.get("low_rank")
    return NewExpert(
        tuple(Source(int(s["expert"]), float(s["weight"]), indices(s.get("permutation"))) for s in data["sources"]),
        indices(data["channels"]),
        down=array(data.get("down")),
        constant=array(data.get("constant")),
        low_rank=low and LowRank(_there(array(low["left"])), _there(array(low["right"])), array(low.get("shift"))),
    )


def _array(name: str | None, arrays: Mapping[str, np.ndarray]) -> Array | None:
    if name is None:
        return None
    if name not in arrays:
        raise WinnowError(f"not a compression plan: it names {name}, which is not in {ARRAYS} beside it")
    return Array(arrays[name])


def _there(array: Array | None) -> Array:
    if array is None:
        raise TypeError("a factor has no name")
    return array
