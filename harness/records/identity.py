"""What makes a cell the one that it is, and its id: names, settings, versions and content, not where code lies."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.contracts.record import LEAVES, STAGES, Record

# What of a suite cannot change a result: where its data lie, how its judge is reached, what its tasks are filed under.
NOT_OF_SUITE = ("root", "base_url", "api_key_env", "timeout", "retries", "backoff", "concurrency", "domain", "domains")
# What of a backend changes no number but by rounding: how much is computed at once and where it is kept.
NOT_OF_BACKEND = (
    "batch_size", "stream", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib", "start_seconds",
)  # fmt: skip
# Contents that do not bear on the uncompressed model.
OF_CELL_ALONE = ("corpus", "code/method")
_CONTENTS = {
    "model": "the model's weights or config.json", "tokenizer": "the tokenizer's files",
    "corpus": "the calibration text",
}  # fmt: skip
# Where code lies: of no consequence for any result.
TARGET = "_target_"
_SLUG_LENGTH = 48


def identity(
    cell: Mapping[str, Any],
    config: Mapping[str, Any],
    contents: Mapping[str, str],
    method_version: str,
    task_versions: Mapping[str, str],
    versions: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that decides the numbers of a cell beside its description, and what of it decides its baseline's."""
    of_all: dict[str, Any] = {
        "contents": {name: content for name, content in contents.items() if name not in OF_CELL_ALONE},
        "dtype": config["model"]["dtype"],
        "suite": without(config["suite"], NOT_OF_SUITE),
        "task_versions": dict(task_versions),
        "backend": without(config["backend"]["open"], NOT_OF_BACKEND),
    }
    if config.get("strict_versions"):
        of_all["versions"] = {name: version for name, version in versions.items() if name != "platform"}
    of_cell = of_all | {
        "contents": dict(contents),
        "method": without(config["method"], () if config["method"].get("constants") else ("constants",)),
        "method_version": method_version,
        "layout": config["layout"],
        "lower_top_k": bool(config.get("lower_top_k", False)),
        **{stage: without(config[stage], ()) for stage in STAGES if stage in cell},
    }
    return of_cell, of_all


def identified(
    cell: Mapping[str, Any],
    config: Mapping[str, Any],
    contents: Mapping[str, str],
    method_version: str,
    task_versions: Mapping[str, str],
    versions: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of a cell and that of its baseline (the uncompressed model), both with their ids.

    ``cell`` has model, method, ratio, calibration ("none" where no text was read), seed, suite, backend and the stages
    beside the method; ``config`` is the resolved configuration; ``contents`` holds the fingerprints of what is read
    (``harness.cells.contents``): model, tokenizer, corpus, items/TASK. ``method_version`` and ``task_versions`` are
    those of the code that decides and scores; ``versions`` of packages count where ``strict_versions`` asks for it.
    Settings that change no number are left out, and those of calibration, whose work is the content of the corpus.
    """
    of_cell, of_all = identity(cell, config, contents, method_version, task_versions, versions)
    baseline = {"model": cell["model"], "method": "none", "ratio": 0.0, "calibration": "none", "seed": 0}
    baseline |= {key: cell[key] for key in ("suite", "backend")}
    described = {key: value for key, value in cell.items() if key not in ("id", "baseline")}
    described["id"] = cell_id(described, of_cell)
    baseline["id"] = cell_id(baseline, of_all)
    return described | {"baseline": baseline["id"]}, baseline


def identity_of(record: Record) -> dict[str, Any]:
    """What a record says of everything that decided its numbers, beside its description."""
    of_cell, of_all = identity(
        record.cell, record.config, record.fingerprints, record.method_version, record.task_versions, record.versions
    )
    return of_all if record.is_uncompressed() else of_cell


def changes(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs between two identities, a phrase each."""
    told = []
    for key in sorted({*before, *now}):
        name, old, new = f"{within}{key}", before.get(key), now.get(key)
        if isinstance(old, Mapping) or isinstance(new, Mapping):
            told += changes(old or {}, new or {}, f"{name}.")
        elif old != new and name.startswith("contents."):
            kind, _, of = key.partition("/")
            told.append(f"{_CONTENTS.get(key, f'the {kind} of {of}')} changed")
        elif old != new:
            told.append(f"{name} {old} -> {new}")
    return told


def without(node: Any, keys: Sequence[str]) -> Any:
    """A node of the configuration without these keys, without where its code lies, and without what is null or empty
    and so says nothing, at any depth."""
    if not isinstance(node, Mapping):
        return node
    kept = {key: without(value, keys) for key, value in node.items() if key not in (TARGET, *keys)}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


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
        *(cell[stage] for stage in (LEAVES, *STAGES) if stage in cell),
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
