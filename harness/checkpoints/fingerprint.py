"""Fingerprints: what a checkpoint is, by its content."""

import hashlib
from pathlib import Path

from harness.errors import WinnowError

_FULL_HASH_BYTES = 2**30
_CHUNK_BYTES = 2**20
_CHUNKS_PER_FILE = 64
_WEIGHTS = "*.safetensors"


def model_fingerprint(folder: Path) -> str:
    """``sha256:...`` over the name, size and content of config.json and of every weight file.

    Where the weights are 1 GiB or more together, ``sha256-sampled:...``: of each file its size and 64 evenly
    spaced chunks of 1 MiB, the first of which holds the header. Raises WinnowError where there are no
    weights.
    """
    folder = Path(folder)
    weights = sorted(folder.glob(_WEIGHTS))
    if not weights or not (folder / "config.json").is_file():
        raise WinnowError(f"no model at {folder}: it needs config.json and weights ({_WEIGHTS})")
    try:
        sampled = sum(path.stat().st_size for path in weights) >= _FULL_HASH_BYTES
        digest = hashlib.sha256()
        for path in [folder / "config.json", *weights]:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                starts = _chunk_starts(size) if sampled else range(0, size, _CHUNK_BYTES)
                for start in starts:
                    file.seek(start)
                    digest.update(file.read(_CHUNK_BYTES))
    except OSError as error:
        raise WinnowError(f"cannot read the model at {folder}: {error}") from error
    return f"{'sha256-sampled' if sampled else 'sha256'}:{digest.hexdigest()}"


def _chunk_starts(size: int) -> list[int]:
    last = max(size - _CHUNK_BYTES, 0)
    return sorted({last * i // (_CHUNKS_PER_FILE - 1) for i in range(_CHUNKS_PER_FILE)})
