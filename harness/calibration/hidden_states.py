"""The hidden states of a corpus between two decoder layers, batch by batch: in memory, or in files of a folder."""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from harness.errors import WinnowError
from harness.files import is_full

Shape = tuple[int, int, int]  # of a batch: sequences, positions, hidden size
_GIB = 2**30


class Passage(Protocol):
    """The batches of a corpus on their way through one layer: of each in turn ``next``, then ``put``."""

    def next(self) -> Tensor | None:
        """What goes into the layer; None where that is the embedding."""
        ...

    def put(self, behind: Tensor) -> None:
        """What came out of it."""
        ...


class HiddenStates(Protocol):
    def through(self, layer: int, last: bool) -> AbstractContextManager[Passage]:
        """All batches go through ``layer`` meanwhile, and may go again; behind the ``last`` one nothing is kept."""
        ...


class InMemory:
    """One copy, on the host."""

    def __init__(self, batches: int) -> None:
        self._values: list[Tensor | None] = [None] * batches

    @contextmanager
    def through(self, layer: int, last: bool) -> Iterator["InMemory"]:
        self._at, self._last = 0, last
        yield self

    def next(self) -> Tensor | None:
        return self._values[self._at]

    def put(self, behind: Tensor) -> None:
        if not self._last:
            self._values[self._at] = behind.cpu()
        self._at += 1


class OnDisk:
    """A file for each layer in ``folder``, of which two are there while a layer is passed; none is held in memory.

    The next batch is read, and the last one written, while a batch is computed. Raises WinnowError where the disk fills
    up.
    """

    def __init__(self, folder: Path, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self._folder, self._shapes, self._dtype = folder, list(shapes), dtype
        sizes = [prod(shape) * dtype.itemsize for shape in shapes]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()

    @property
    def _bytes(self) -> int:
        return int(self._starts[-1])

    def _path(self, layer: int) -> Path:
        return self._folder / f"behind-{layer:05d}.bin"

    def has(self, layer: int) -> bool:
        """Whether what came out of ``layer`` is there."""
        return self._path(layer).is_file() and self._path(layer).stat().st_size == self._bytes

    def keep(self, layer: int | None) -> None:
        """Removes all but what came out of ``layer``."""
        for path in self._folder.glob("behind-*.bin"):
            if layer is None or path != self._path(layer):
                path.unlink()

    def check_room(self) -> None:
        """Raises WinnowError where the disk cannot hold two files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in self._folder.glob("behind-*.bin"))
        room = shutil.disk_usage(self._folder).free + there
        if 2 * self._bytes > room:
            raise WinnowError(
                f"calibration: the hidden states between two layers need {2 * self._bytes / _GIB:.3g} GiB of disk in "
                f"{self._folder}, which has {room / _GIB:.3g}: free some, or set calibration.memory_gib lower, for "
                "smaller parts of the corpus"
            )

    @contextmanager
    def through(self, layer: int, last: bool) -> Iterator["_FromFileToFile"]:
        source = nullcontext() if layer == 0 else self._path(layer - 1).open("rb", buffering=0)
        target = nullcontext() if last else self._path(layer).open("wb", buffering=0)
        with source as read, target as written, ThreadPoolExecutor(2) as worker:
            passage = _FromFileToFile(read, written, worker, self._shapes, self._dtype, self._starts)
            yield passage
            passage.finish()


class _FromFileToFile:
    def __init__(
        self,
        source: IO[bytes] | None,
        target: IO[bytes] | None,
        worker: ThreadPoolExecutor,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        starts: Sequence[int],
    ) -> None:
        self._source, self._target, self._worker = source, target, worker
        self._shapes, self._dtype, self._starts = shapes, dtype, starts
        self._at = 0
        self._writing: Future[None] | None = None
        self._reading = self._read_ahead(0)

    def next(self) -> Tensor | None:
        if self._reading is None:
            return None
        here = self._reading.result()
        self._reading = self._read_ahead(self._at + 1)
        return here

    def put(self, behind: Tensor) -> None:
        self._wait()
        if self._target is not None:
            shape = self._shapes[self._at]
            assert tuple(behind.shape) == shape and behind.dtype == self._dtype, (behind.shape, behind.dtype)
            self._writing = self._worker.submit(self._write, behind, self._starts[self._at])
        self._at += 1

    def finish(self) -> None:
        self._wait()
        if self._target is not None:
            os.fsync(self._target.fileno())

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _read_ahead(self, batch: int) -> Future[Tensor] | None:
        if self._source is None or batch == len(self._shapes):
            return None
        return self._worker.submit(self._read, self._source, batch)

    def _read(self, source: IO[bytes], batch: int) -> Tensor:
        values = torch.empty(self._shapes[batch], dtype=self._dtype)
        into, place = values.view(torch.uint8).numpy().reshape(-1).data, self._starts[batch]
        while into:
            count = os.preadv(source.fileno(), [into], place)
            if not count:
                raise WinnowError(f"{source.name} ends too early: something else has changed it; run again")
            into, place = into[count:], place + count
        return values

    def _write(self, behind: Tensor, place: int) -> None:
        assert self._target is not None
        left = behind.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data
        try:
            while left:
                count = os.pwrite(self._target.fileno(), left, place)
                left, place = left[count:], place + count
        except OSError as error:
            if not is_full(error):
                raise
            raise WinnowError(
                f"no space left for {self._target.name}: free some and run again; layers that are through stay"
            ) from error
