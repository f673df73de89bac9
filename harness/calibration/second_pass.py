"""A second pass, for the moments of experts that a method has chosen: layer by layer, each kept by content.

The moments of a layer are a file ``<folder>/<key>/LAYER.npz``. The key stands for the model, the corpus, the number
format and all that is looked at. Of a corpus whose hidden states do not fit in memory the parts are added up. Killed, a
pass looks only at the layers that are not through.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.calibration.archive import Damaged, read_archive, read_manifest, write_archive
from harness.calibration.cache import content_key
from harness.calibration.collectors.moments import LookedAt
from harness.calibration.drive import drive
from harness.calibration.recorder import Recorder
from harness.calibration.streamed import Model, chunks
from harness.calibration.tokens import TokenSequence, corpus_fingerprint
from harness.claims import claimed
from harness.contracts.second_pass import Look, Moments, Seen
from harness.families.family import Family
from harness.families.moe_block import MoeBlock

log = logging.getLogger(__name__)


def look_again(
    open_model: Callable[[], Model],
    family: Family,
    sequences: Sequence[TokenSequence],
    looks: Mapping[int, Look],
    folder: Path,
    made_from: Mapping[str, str],
    batch_size: int = 8,
) -> Seen:
    """The moments that ``looks`` (by layer) ask for, by a pass over ``sequences`` or from ``folder``.

    ``made_from`` says by content which model is opened, and in which number format. Raises WinnowError where the
    sequences do not fit the model, where something is not finite, and where the files cannot be written.
    """
    told = {**made_from, "corpus": corpus_fingerprint(sequences), "looks": _fingerprint(looks)}
    key = content_key(told)
    place = folder / key
    with claimed(folder / f"{key}.claim", f"the moments {key}"):
        if all(_whole(place, layer) for layer in looks):
            log.info("reusing moments %s of %d experts", key, sum(len(look.experts) for look in looks.values()))
        else:
            _collect(open_model(), family, sequences, looks, place, batch_size)
    return lambda layer: Moments(**read_archive(_file(place, layer))[1])


def _collect(
    model: Model, family: Family, sequences: Sequence[TokenSequence], looks: Mapping[int, Look], place: Path, size: int
) -> None:
    found = chunks(model, sequences, size)
    for part, (some, _) in enumerate(found):
        left = [layer for layer in looks if _done(place, layer, len(found)) <= part]
        observers = [
            _Kept(layer, family.router_output, _make(looks[layer]), file=_file(place, layer), part=(part, len(found)))
            for layer in left
        ]
        if observers:
            label = "second pass" + (f", part {part + 1} of {len(found)}" if len(found) > 1 else "")
            drive(model, family, some, observers, size, label)


def _make(look: Look) -> Callable[[Any], list[LookedAt]]:
    return lambda experts: [LookedAt(experts, look)]


@dataclass
class _Kept(Recorder):
    """Writes what it has seen of its layer, added to the parts before, and forgets it."""

    file: Path = field(default_factory=Path)
    part: tuple[int, int] = (0, 1)  # this part, and how many there are

    @contextmanager
    def watching(self, block: MoeBlock) -> Iterator[None]:
        with super().watching(block):
            yield
        part, parts = self.part
        before = read_archive(self.file)[1] if part else {}
        arrays = {name: array + before.get(name, 0.0) for name, array in self.arrays.items()}
        write_archive(self.file, {"parts": [part + 1, parts]}, arrays)
        self.arrays = {}


def _file(place: Path, layer: int) -> Path:
    return place / f"{layer}.npz"


def _parts_in(place: Path, layer: int) -> tuple[int, int]:
    """How many parts of how many are in the file of the layer; none where there is none, or a damaged one."""
    try:
        done, parts = read_manifest(_file(place, layer))["parts"]
        return done, parts
    except FileNotFoundError:
        return 0, 0
    except (Damaged, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): the layer is looked at again", _file(place, layer), error)
        return 0, 0


def _whole(place: Path, layer: int) -> bool:
    done, parts = _parts_in(place, layer)
    return 0 < done == parts


def _done(place: Path, layer: int, parts: int) -> int:
    """Parts that are in, where they are as many in all as now; a file that is whole has all of them."""
    done, of = _parts_in(place, layer)
    return parts if 0 < done == of else done if of == parts else 0


def _fingerprint(looks: Mapping[int, Look]) -> str:
    digest = hashlib.sha256()
    for layer, look in sorted(looks.items()):
        digest.update(f"{layer} {list(look.experts)} {look.gate_squared}".encode())
        for array in (look.inputs, look.outputs, look.basis):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
