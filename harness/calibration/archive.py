"""Arrays and what is to be known of them in one file: npz, with JSON among the arrays as ``manifest``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import first_line
from harness.files import write_files

_MANIFEST = "manifest"


class Damaged(Exception):
    """An archive that is there does not hold what was written."""


def write_archive(path: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Atomically. Raises WinnowError where the disk is full or the folder cannot be written."""
    told = json.dumps({**manifest, "arrays": sorted(arrays)}).encode()
    packed: Any = {_MANIFEST: np.frombuffer(told, dtype=np.uint8), **arrays}  # numpy's stubs take keywords for options
    write_files({path: lambda file: np.savez(file, **packed)})


def read_manifest(path: Path) -> dict[str, Any]:
    """Without the arrays. Raises Damaged, and FileNotFoundError where there is no such file."""
    return read_archive(path, lambda name: False)[0]


def read_archive(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the arrays whose names are ``wanted``, each of which is held against its checksum.

    Raises Damaged, and FileNotFoundError where there is no such file.
    """
    try:
        with np.load(path) as archive:
            manifest = json.loads(archive[_MANIFEST].tobytes())
            names = manifest.pop("arrays")
            if sorted({*archive.files} - {_MANIFEST}) != names:
                raise Damaged("it does not hold the arrays that it should")
            return manifest, {name: archive[name] for name in names if wanted(name)}
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes make zipfile and numpy raise almost anything
        raise Damaged(first_line(error)) from error
