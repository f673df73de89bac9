"""Which file of a checkpoint folder holds which tensor: one answer for reading, fingerprints, engines and copies.

The index decides where there is one; else the single file. Files that no loader reads (a second format, a whole copy
beside the shards) mean nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from harness.errors import WinnowError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """``files`` hold the tensors; ``assigned`` says which file each is in, where an index does (else None)."""

    folder: Path
    files: tuple[Path, ...]
    assigned: dict[str, Path] | None = None

    @property
    def index(self) -> Path | None:
        return None if self.assigned is None else self.folder / INDEX


def weight_files(folder: Path) -> WeightFiles:
    """Raises WinnowError where there are no weights, several files without an index, or a shard is missing."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _by_index(folder)
    if (folder / WEIGHTS).is_file():
        return WeightFiles(folder, (folder / WEIGHTS,))
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = " and ".join(path.name for path in found[:2])
        raise WinnowError(f"{folder} has {names} and no {INDEX} that says which holds what: fetch the checkpoint again")
    if not found:
        bins = sorted(folder.glob("*.bin"))
        advice = f" ({bins[0].name} is another format: save it again with save_pretrained)" if bins else ""
        raise WinnowError(f"no weights in {folder}: expected {WEIGHTS} or shards with {INDEX}{advice}")
    return WeightFiles(folder, (found[0],))


def _by_index(folder: Path) -> WeightFiles:
    index = folder / INDEX
    try:
        assigned = {str(name): folder / str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WinnowError(f"{index} is not a valid index of shards: {error!r}") from error
    files = tuple(sorted(set(assigned.values())))
    if not files:
        raise WinnowError(f"{index} names no tensor: fetch the checkpoint again")
    for path in files:
        if not path.is_file():
            raise WinnowError(f"shard {path.name} is missing from {folder}, though {INDEX} names it: fetch it again")
    return WeightFiles(folder, files, assigned)
