"""What a pass one layer at a time has so far, in a folder: if it is killed, it goes on behind the last layer saved."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import transformers

from harness.calibration.archive import Damaged, read_archive, write_archive
from harness.calibration.batches import Batch
from harness.calibration.collected import Part
from harness.calibration.hidden_states import OnDisk
from harness.calibration.observer import Observer
from harness.calibration.streamed import Model, StreamedModel
from harness.calibration.tokens import TokenSequence, corpus_fingerprint
from harness.checkpoints.by_layer import ModelByLayer
from harness.claims import claimed

log = logging.getLogger(__name__)


@runtime_checkable
class Resumable(Observer, Protocol):
    """An observer that another process can take over from."""

    def state(self) -> dict[str, np.ndarray]:
        """What is known of the layer, when it is through."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None: ...


@contextmanager
def kept(
    model: Model, sequences: Sequence[TokenSequence], part: Part | None, what: Mapping[str, Any]
) -> Iterator[Path | None]:
    """A folder for what a pass for ``what`` has so far, which is that of the same pass before where it was killed.

    None for a whole model, and where nothing is to be kept. It is removed where the context ends without an error.
    """
    if not isinstance(model, StreamedModel) or model.state is None:
        yield None
        return
    told = {
        "model": model.fingerprint,
        "corpus": corpus_fingerprint(sequences),
        "part": None if part is None else [part.offset, part.total],
        "dtype": str(model.model.dtype),
        "versions": [torch.__version__, transformers.__version__],
        **what,
    }
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = model.state / key
    with claimed(model.state / f"{key}.claim", f"the calibration pass {key}"):
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


class Saved:
    """The layers of a pass that are through, in a folder: what their observers know, and the last hidden states."""

    def __init__(
        self, folder: Path, model: ModelByLayer, batches: Sequence[Batch], observers: Sequence[Observer]
    ) -> None:
        self._folder = folder
        self._observers = [observer for observer in observers if isinstance(observer, Resumable)]
        assert len(self._observers) == len(observers)
        size = model.config.hidden_size
        shapes = [(*batch.input_ids.shape, size) for batch in batches]
        self.hidden = OnDisk(folder, shapes, model.dtype)  # type: ignore[arg-type]

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.npz"

    def restore(self, last: int) -> int:
        """The first layer that is not through; observers of those before get back what they knew."""
        found: list[dict[str, np.ndarray]] = []
        while len(found) <= last and (state := self._read(len(found))) is not None:
            found.append(state)
        if found and len(found) <= last and not self.hidden.has(len(found) - 1):
            found = []
        for observer in self._observers:
            if observer.layer < len(found):
                observer.restore(found[observer.layer])
        if found:
            log.info("calibration: going on behind layer %d of %d, where the pass was stopped", len(found), last + 1)
        if len(found) <= last:
            self.hidden.keep(len(found) - 1)
            self.hidden.check_room()
        return len(found)

    def _read(self, layer: int) -> dict[str, np.ndarray] | None:
        try:
            return read_archive(self._path(layer))[1]
        except FileNotFoundError:
            return None
        except Damaged as error:
            log.warning("%s is damaged (%s): the pass goes on before it", self._path(layer), error)
            return None

    def save(self, layer: int, observers: Sequence[Observer]) -> None:
        state = {key: value for each in observers if isinstance(each, Resumable) for key, value in each.state().items()}
        write_archive(self._path(layer), {"layer": layer}, state)
        self.hidden.keep(layer)
