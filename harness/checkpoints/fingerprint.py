"""Fingerprints: what a checkpoint and its tokenizer are, by their content."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from harness.checkpoints.weight_files import weight_files
from harness.errors import WinnowError
from harness.files import user_cache, write_files
from harness.progress import bar

log = logging.getLogger(__name__)

_CHUNK_BYTES = 2**22
_LARGE = 2**30  # bytes of all files from which on their hashes are worth remembering
# Seconds within which a file system may give two versions of a file the same time.
_CLOCK = 2.0
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json",
)  # fmt: skip


def model_fingerprint(folder: Path) -> str:
    """``sha256:...`` over the name, size and content of config.json and of every file that holds weights.

    Every byte counts. Hashes of large files are remembered by path, size, times and inode, but not those of files that
    were changed just now. Raises WinnowError where there are no weights.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WinnowError(f"no model at {folder}: it needs config.json and weights")
    found = weight_files(folder)
    return _fingerprint([folder / "config.json", *([found.index] if found.index else []), *found.files])


def tokenizer_fingerprint(folder: Path) -> str:
    """``sha256:...`` over what decides how text becomes tokens and where it ends: vocabulary, template, end tokens."""
    return _fingerprint(sorted({path for name in TOKENIZER_FILES for path in Path(folder).glob(name)}))


def _fingerprint(paths: Iterable[Path]) -> str:
    """Where the files are large together, the digest of each stands for its content."""
    digest = hashlib.sha256()
    try:
        sizes = {path: path.stat().st_size for path in paths}
        large = sum(sizes.values()) >= _LARGE
        for path, size in sizes.items():
            digest.update(f"{path.name} {size}\n".encode())
            digest.update(_remembered(path).encode() if large else path.read_bytes())
    except OSError as error:
        raise WinnowError(f"cannot read {error.filename}: {error.strerror}") from error
    return f"sha256:{digest.hexdigest()}"


def _remembered(path: Path) -> str:
    """The sha256 of a large file, from the user's cache where the file is certainly the one that was hashed."""
    memory, seen = user_cache() / "hashes.json", _state(path)
    known = _read(memory)
    key = str(path.resolve())
    if known.get(key, {}).get("state") == seen:
        return str(known[key]["sha256"])
    digest = _sha256(path)
    # A file that was touched within the clock's resolution may be changed again without a trace in its times.
    if _state(path) == seen and time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > _CLOCK:
        try:
            write_files({memory: json.dumps(_read(memory) | {key: {"state": seen, "sha256": digest}}).encode()})
        except WinnowError as error:
            log.warning("the hash of %s is not remembered: %s", path.name, error)
    return digest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, bar(f"reading {path.name}", path.stat().st_size) as shown:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            shown.update(len(chunk))
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev]


def _read(memory: Path) -> dict[str, dict[str, object]]:
    try:
        found = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
