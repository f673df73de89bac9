"""What makes a cell the one that it is, and its id: names, settings, versions and content, not where code lies."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.contracts.record import STAGES

# What of the calibration node cannot change a result: how the pass is run and what else it collects.
NOT_OF_CALIBRATION = ("statistics", "batch_size", "corpus")
# What of a suite cannot change a result: where its data lie, how its judge is reached, what its tasks are filed under.
NOT_OF_SUITE = ("root", "base_url", "api_key_env", "timeout", "retries", "backoff", "concurrency", "domain")
# Where code lies: of no consequence for any result.
TARGET = "_target_"
_SLUG_LENGTH = 48


def identified(
    cell: Mapping[str, Any],
    config: Mapping[str, Any],
    model: str,
    method_version: str,
    task_versions: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of a cell and that of its baseline (the uncompressed model), both with their ids.

    ``cell`` has model, method, ratio, calibration ("none" where no text was read), seed, suite, backend and the stages
    beside the method; ``config`` is the resolved configuration; ``model`` the fingerprint of the checkpoint. Versions
    are those of the code that decides and scores. Settings that change no number are left out.
    """
    method, calibration = config["method"], config["calibration"]
    of_all: dict[str, Any] = {
        "model": {"fingerprint": model, "dtype": config["model"]["dtype"]},
        "suite": without(config["suite"], NOT_OF_SUITE),
        "task_versions": dict(task_versions),
    }
    if config["backend"]["open"].get("engine"):
        of_all["engine"] = config["backend"]["open"]["engine"]
    baseline = {key: cell[key] for key in ("model", "suite", "backend")}
    baseline = {
        "model": baseline.pop("model"),
        "method": "none",
        "ratio": 0.0,
        "calibration": "none",
        "seed": 0,
    } | baseline
    of_cell = of_all | {
        "method": without(method, ()),
        "method_version": method_version,
        "calibration": {"name": "none"} if cell["calibration"] == "none" else without(calibration, NOT_OF_CALIBRATION),
        "layout": config["layout"],
        "lower_top_k": bool(config.get("lower_top_k", False)),
        **{stage: without(config[stage], ()) for stage in STAGES if stage in cell},
    }
    described = {key: value for key, value in cell.items() if key not in ("id", "baseline")}
    described["id"] = cell_id(described, of_cell)
    baseline["id"] = cell_id(baseline, of_all)
    return described | {"baseline": baseline["id"]}, baseline


def without(node: Any, keys: Sequence[str]) -> Any:
    """A node of the configuration without these keys and without where its code lies, at any depth."""
    if not isinstance(node, Mapping):
        return node
    return {key: without(value, keys) for key, value in node.items() if key not in (TARGET, *keys)}


def cell_id(cell: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """A readable name and 8 hex digits of a hash, safe as a file name:
    ``reference__reap__0.25__code__s0-1a2b3c4d``.

    ``cell`` needs model, method, ratio, calibration and seed. ``identity`` is everything else that changes
    the result. Equal numbers hash alike however they were typed (``ratio=0`` and ``ratio=0.0``).
    """
    words = [
        cell["model"],
        cell["method"],
        f"{float(cell['ratio']):g}",
        cell["calibration"],
        f"s{cell['seed']}",
        *(cell[stage] for stage in STAGES if stage in cell),
    ]
    slug = "__".join(re.sub(r"[^A-Za-z0-9._]+", "-", str(word)).strip("-.")[:_SLUG_LENGTH] for word in words)
    content = {"cell": {key: value for key, value in cell.items() if key != "id"}, "identity": identity}
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"))
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain(value: Any) -> Any:
    """What JSON does not know: arrays and scalars of numpy, and paths. Raises TypeError for anything else."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _canonical(plain(value))
