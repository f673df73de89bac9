"""Calibration results on disk: computed once, then shared by every cell and every process that needs them."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.calibration.archive import Damaged, read_manifest
from harness.calibration.collected import Collected
from harness.claims import claimed
from harness.files import sweep, write_files

log = logging.getLogger(__name__)


def cached_statistics(
    cache_dir: Path,
    key_parts: Mapping[str, Any],
    needed: frozenset[str],
    compute: Callable[[frozenset[str]], Collected],
) -> Collected:
    """The statistics ``needed``, from ``<cache_dir>/<key>/`` or else by ``compute(names)``.

    The folder holds ``statistics.npz`` and ``manifest.json`` (the key's parts, tokens, usage by source,
    names, seconds, sha256 of the arrays). Where some names are missing, the union of old and new is computed; what
    ``compute`` leaves out of the old ones stays as it was. One process computes and the others wait for it. A damaged
    entry is computed anew, with a warning. Raises WinnowError where the cache cannot be written.
    """
    key = content_key(key_parts)
    folder = Path(cache_dir) / key
    with claimed(folder.with_suffix(".claim"), f"calibration statistics {key}"):
        sweep(folder, ".*.tmp")  # who holds the lock is alone: what is left of other writers is of dead ones
        found = _load(folder)
        if found is not None and needed <= found.names:
            log.info(
                "reusing calibration statistics %s (%d sequences, %d tokens)",
                key,
                found.sequences,
                found.tokens,
            )
            return found
        collected = compute(needed if found is None else needed | found.names)
        if found is not None:
            layers = {layer: found.layers[layer] | arrays for layer, arrays in collected.layers.items()}
            collected = replace(collected, layers=layers)
        _save(folder, collected, key_parts)
        return collected


def content_key(key_parts: Mapping[str, Any]) -> str:
    """16 hex digits that stand for what statistics are made from."""
    return hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()[:16]


def statistics_in(file: Path) -> frozenset[str]:
    """Which statistics a ``manifest.json``, or the file of a shard, says are there; none where it cannot be read."""
    try:
        if file.suffix == ".npz":
            return frozenset(read_manifest(file)["statistics"])
        manifest = json.loads(file.read_text())
        return frozenset(manifest["statistics"]) if file.with_name("statistics.npz").is_file() else frozenset()
    except (OSError, ValueError, KeyError, TypeError, Damaged):
        return frozenset()


def _load(folder: Path) -> Collected | None:
    """What the folder holds; None where it holds nothing or something damaged."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.exists():
        return None
    try:
        manifest = json.loads(manifest_path.read_text())
        arrays_path = folder / "statistics.npz"
        if manifest["sha256"] != _digest(manifest):
            raise ValueError("manifest.json was changed after it was written")
        if _sha256(arrays_path) != manifest["statistics_sha256"]:
            raise ValueError("statistics.npz is not the file that manifest.json describes")
        layers: dict[int, dict[str, np.ndarray]] = {}
        with np.load(arrays_path) as arrays:
            for name in arrays.files:
                layer, statistic = name.split("/")
                layers.setdefault(int(layer), {})[statistic] = arrays[name]
        return Collected(**{field: manifest[field] for field in MANIFEST_FIELDS}, layers=layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("calibration cache %s is damaged (%s): computing it anew", folder, error)
        return None


MANIFEST_FIELDS = ("num_experts", "top_k", "n_group", "sequences", "tokens", "seconds", "usage")


def _save(folder: Path, collected: Collected, key_parts: Mapping[str, Any]) -> None:
    arrays = {f"{layer}/{name}": value for layer, named in collected.layers.items() for name, value in named.items()}
    # The manifest comes last and names the arrays' hash, so a write that stops in between is found out.
    packed: Any = arrays  # numpy's stubs take keyword arrays for its other options
    write_files({folder / "statistics.npz": lambda file: np.savez_compressed(file, **packed)})
    manifest = {
        **{field: getattr(collected, field) for field in MANIFEST_FIELDS},
        "key": dict(key_parts),
        "statistics": sorted(collected.names),
        "statistics_sha256": _sha256(folder / "statistics.npz"),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_files({folder / "manifest.json": json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode()})


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but its digest."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
