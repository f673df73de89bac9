"""Checkpoint folders in the hub layout: read tensor by tensor and checked by their headers.

A quantised checkpoint (``harness.checkpoints.quantize``) is read by the names, and with the shapes, that its packed
matrices (``harness.checkpoints.packed_weights``) had before. What is stored of each MoE layer is for
``harness.checkpoints.layout`` to say.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from harness.checkpoints import packed_weights as packed
from harness.checkpoints.config import read_config
from harness.checkpoints.weight_files import WEIGHTS, weight_files
from harness.errors import WinnowError

_AHEAD = 2**22  # bytes that are read ahead at once


class Tensors(Protocol):
    """What is known of a checkpoint's tensors without their values."""

    def names(self) -> list[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int:
        """What is stored of it."""
        ...


class CheckpointReader:
    """The safetensors files of ``folder``, mapped into memory: a tensor costs nothing until it is used.

    A packed matrix goes by the name of its weight. A tensor that the index assigns to one file is not looked for in
    another. Raises WinnowError where there are no weights, a shard is missing, a file cannot be read, is truncated or
    corrupt, or config.json does not say how packed matrices are to be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        found = weight_files(self.folder)
        self.files = list(found.files)
        # Would a loader that does not heed the index read other tensors than this one?
        self.is_ambiguous = found.index is not None and (self.folder / WEIGHTS).is_file()
        self._file: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        for path in self.files:
            try:
                path.open("rb").close()  # safe_open says of what may not be read that it is not there
                # safe_open compares the file's length with its header, so a truncated shard is found here
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, ValueError) as error:
                raise WinnowError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error
            except OSError as error:
                raise WinnowError(f"{path} cannot be read: {error.strerror or error}") from error
            stored = list(self._handles[path].keys())
            own = [name for name in stored if found.assigned is None or found.assigned.get(name) == path]
            self._file |= dict.fromkeys(own, path)
            self.is_ambiguous |= len(own) < len(stored)
        self._packed = self._packed_matrices()
        hidden = {f"{module}.{part}" for module, scheme in self._packed.items() for part in packed.part_names(scheme)}
        self._names = [name for name in self._file if name not in hidden]
        self._names += [f"{module}.weight" for module in self._packed]

    def _packed_matrices(self) -> dict[str, packed.Scheme]:
        """The modules whose weight is packed, and how."""
        ending = f".{packed.PACKED}"
        modules = [name.removesuffix(ending) for name in self._file if name.endswith(ending)]
        groups = packed.read_config_groups(read_config(self.folder)) if modules else []
        found = {}
        for module in modules:
            scheme = next((scheme for pattern, scheme in groups if pattern.match(module)), None)
            if scheme is None:
                raise WinnowError(f"{self.folder}: config.json does not say how {module}{ending} is packed")
            found[module] = scheme
        return found

    def scheme(self, name: str) -> packed.Scheme | None:
        """How a tensor is packed; None where it is stored as it is."""
        return self._packed.get(name.removesuffix(".weight"))

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._file or self.scheme(name) is not None

    def file_of(self, name: str) -> Path:
        """The file that holds it, or what is packed of it."""
        return self._file_with(name if self.scheme(name) is None else f"{name}_packed")

    def _file_with(self, stored: str) -> Path:
        try:
            return self._file[stored]
        except KeyError:
            raise WinnowError(f"{self.folder} has no tensor {stored}: the checkpoint is incomplete") from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapped file; a packed one dequantised, in the dtype of its scales."""
        scheme = self.scheme(name)
        return self._stored(name) if scheme is None else packed.unpacked(self._parts(name, scheme), scheme)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of ``tensor(name)``. Raises WinnowError where the parts of a packed one do not fit together."""
        scheme = self.scheme(name)
        if scheme is None:
            return tuple(self._handle(name).get_slice(name).get_shape())
        parts = self._parts(name, scheme)
        outputs, inputs = parts[packed.SHAPE].tolist()
        groups = 1 if scheme.group is None else inputs // scheme.group
        if groups * (scheme.group or inputs) != inputs:
            raise WinnowError(f"{self.folder}: {name} has {inputs} inputs, which are no groups of {scheme.group}")
        for part, shape in packed.part_shapes(outputs, inputs, groups, scheme).items():
            found = tuple(parts[part].shape)
            if found != shape:
                raise WinnowError(f"{self.folder}: the {part} of {name} has shape {found}, not {shape}")
        return outputs, inputs

    def nbytes(self, name: str) -> int:
        """What is stored of it: for a packed tensor all its parts."""
        scheme = self.scheme(name)
        stored = [self._stored(name)] if scheme is None else self._parts(name, scheme).values()
        return sum(tensor.nbytes for tensor in stored)

    def _stored(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(name).get_tensor(name)
        return tensor

    def _handle(self, name: str) -> Any:
        path = self._file_with(name)
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt")
        return self._handles[path]

    def let_go(self) -> None:
        """Pages of the files that were read count as memory of this process until their last tensor is gone."""
        self._handles.clear()

    def read_ahead(self, names: Iterable[str], stop: Event) -> None:
        """Have the system read what is stored of ``names`` into its cache, until ``stop`` is set.

        Faults are left for reading itself to find.
        """
        buffer = bytearray(_AHEAD)
        by_file: dict[Path, list[str]] = {}
        for name in names:
            scheme = self.scheme(name)
            module = name.removesuffix(".weight")
            stored = [name] if scheme is None else [f"{module}.{part}" for part in packed.part_names(scheme)]
            for part in stored:
                by_file.setdefault(self._file_with(part), []).append(part)
        with suppress(OSError):
            for path, stored in by_file.items():
                with path.open("rb", buffering=0) as file:
                    for start, end in _ranges(file, stored):
                        for place in range(start, end, _AHEAD):
                            if stop.is_set():
                                return
                            os.preadv(file.fileno(), [memoryview(buffer)[: end - place]], place)

    def _parts(self, name: str, scheme: packed.Scheme) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        return {part: self._stored(f"{module}.{part}") for part in packed.part_names(scheme)}


def _ranges(file: Any, names: list[str]) -> list[tuple[int, int]]:
    """Where in a safetensors file these tensors lie, in the order of the file."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    places = (header[name]["data_offsets"] for name in names)
    return sorted((8 + size + start, 8 + size + end) for start, end in places)
