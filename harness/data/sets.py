"""The rows of a data set, from the hub or from a folder that ``winnow-data`` filled (``harness.data.schema`` has the
table of sets)."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data.schema import Row, find
from harness.errors import WinnowError


class NotStaged(WinnowError):
    """The folder of staged data does not hold what was asked for."""


def rows(name: str, root: str | None = None) -> list[Row]:
    """All rows of the benchmark or corpus ``name``, in the order of its source.

    ``root``: the folder that ``winnow-data stage`` filled, of which alone is read; without, the set comes from the hub.
    Raises WinnowError for a set that is unknown, not staged, damaged or out of reach.
    """
    if root is not None:
        return staged_rows(name, root)
    from harness.data.hub import hub_rows  # imports `datasets`, which takes seconds

    return hub_rows(name, find(name))


# --- staged data: ROOT/NAME/data.jsonl.gz and, written last, ROOT/NAME/manifest.json ----------------------------------


def is_staged(name: str, root: str | None) -> bool:
    """Whether ``root`` holds the set (without reading its rows)."""
    return root is not None and (Path(root) / name / "manifest.json").is_file()


def staged_rows(name: str, root: str) -> list[Row]:
    """The rows under ``root``. Raises NotStaged, or WinnowError where they are not what the manifest says."""
    manifest = read_manifest(name, root)
    path = Path(root) / name / "data.jsonl.gz"
    again = f"stage it again: winnow-data stage --only {name} --to {root}"
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise WinnowError(f"cannot read {path} ({error.strerror or error}); {again}") from error
    if hashlib.sha256(packed).hexdigest() != manifest["sha256"]:
        raise WinnowError(f"{path} is damaged: its sha256 is not the manifest's; {again}")
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def read_manifest(name: str, root: str) -> dict[str, Any]:
    """What is known of a staged set: its source, sha256, rows, licence, note. Raises NotStaged, WinnowError."""
    path = Path(root) / name / "manifest.json"
    if not path.is_file():
        raise NotStaged(f"{name} is not staged in {root}: run winnow-data stage --only {name} --to {root}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if {"name", "source", "sha256", "rows"} <= set(manifest) and manifest["name"] == name:
            return manifest
    except (OSError, ValueError, TypeError) as error:
        raise WinnowError(f"{path} is damaged ({error}); delete the folder and stage {name} again") from error
    raise WinnowError(f"{path} is not the manifest of {name}; delete the folder and stage {name} again")


def packed_rows(found: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as gzipped JSON lines; the same rows give the same bytes. Raises WinnowError where ids repeat."""
    ids = [row.get("id") for row in found]
    if not all(isinstance(one, str) for one in ids) or len(set(ids)) < len(ids):
        raise WinnowError("rows of a data set need string ids that differ")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    return gzip.compress(lines.encode(), mtime=0)
