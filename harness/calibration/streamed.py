"""Models for a pass: whole, or where they are larger than memory one decoder layer at a time.

What is in memory then is one layer, what is outside of the layers (the embedding) and, unless they are on disk, the
hidden states of the text. A corpus whose hidden states do not fit goes through in parts.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import PreTrainedModel

from harness.calibration.collected import Part
from harness.calibration.shards import parts
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.by_layer import ModelByLayer, dtype_of
from harness.checkpoints.config import read_config
from harness.checkpoints.fingerprint import model_fingerprint
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.load import load_model
from harness.checkpoints.offload import SPREAD, one_device
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.sizes import checkpoint_sizes
from harness.errors import WinnowError

log = logging.getLogger(__name__)

Stream = Literal["auto", "always", "never"]
_GIB = 2**30
_GROUPS_OF_PROCESS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MARGIN = 1.25  # of memory: what is computed with weights and hidden states takes some too
STACKING = 4 / 3  # of the largest layer, while its experts' matrices are put into one


@dataclass(frozen=True)
class StreamedModel:
    """``model`` one layer at a time; ``memory`` bytes are left for hidden states.

    ``state`` is a folder for passes that are not finished, or None: then they do not go on after a kill.
    """

    model: ModelByLayer
    memory: int
    state: Path | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def skeleton(self) -> PreTrainedModel:
        return self.model.skeleton

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model.folder)


Model = PreTrainedModel | StreamedModel


def open_for_pass(
    folder: str | Path,
    dtype: str = "auto",
    device: str | int | dict[str, Any] = "cpu",
    stream: Stream = "auto",
    memory_gib: float | None = None,
    state: Path | None = None,
) -> Model:
    """The checkpoint for ``collect``, ``gate_ratio_counts`` and ``diagnose``: whole, or one layer at a time.

    ``stream`` is calibration.stream: "auto" takes one layer at a time where the model does not fit the memory that is
    free on ``device`` (on a CPU also not ``memory_gib``), and never where a device map says where each part goes.
    ``memory_gib`` is how much of the host's memory a pass by layers may take, by default what is free with a margin.
    ``state`` is a folder in which such a pass keeps what it has so far.

    Raises WinnowError as ``load_model`` does, and where there is less memory than one layer needs.
    """
    folder = resolve_checkpoint(folder)
    if not is_streamed(folder, dtype, device, stream, memory_gib):
        return load_model(folder, dtype, device)  # type: ignore[arg-type]
    where = one_device(device)
    log.info("%s is read one layer at a time, to %s", folder, where)
    model = ModelByLayer(folder, dtype, where)
    return StreamedModel(model, _left_for_hidden_states(model, memory_gib), state)


def is_streamed(folder: Path, dtype: str, device: Any, stream: Stream, memory_gib: float | None) -> bool:
    """Whether ``open_for_pass`` reads the checkpoint one layer at a time."""
    return stream == "always" or (stream == "auto" and not _fits(folder, dtype, device, memory_gib))


def chunks(model: Model, sequences: Sequence[TokenSequence], batch_size: int) -> list[tuple[list[TokenSequence], Part]]:
    """The corpus in parts whose hidden states fit, in the order of a pass; one part for a whole model.

    Their number is a power of two, so that a little more or less free memory seldom changes it. Raises WinnowError
    where one batch does not fit.
    """
    count = 1
    while isinstance(model, StreamedModel):
        found = [each for each in parts(sequences, batch_size, count) if each[0]]
        largest = max(_hidden_bytes(model, some, batch_size) for some, _ in found)
        if largest <= model.memory:
            return found
        if count >= len(sequences):
            raise WinnowError(
                f"calibration: the hidden states of one batch need {largest / _GIB:.3g} GiB, but "
                f"{model.memory / _GIB:.3g} are left: set calibration.batch_size lower or calibration.memory_gib higher"
            )
        count *= 2
    return parts(sequences, batch_size, count)


# --- memory -----------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``; on a CPU no more than its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_in_group())


def _left_in_group() -> int:
    """What Linux leaves this process of the limits of its control groups, of which cached files can go."""
    return min((_left(folder, *names) for folder, names in _groups()), default=2**63 - 1)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups that this process is in, of versions 2 and 1, and what their files are called."""
    try:
        lines = _GROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = _GROUPS / "memory"
        else:
            continue
        inside = Path(path.lstrip("/"))
        yield from ((root / folder, names) for folder in (inside, *inside.parents))


def _left(folder: Path, limit: str, used: str, cached: str) -> int:
    try:
        most = (folder / limit).read_text().strip()
        taken = int((folder / used).read_text())
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**63 - 1
    return max(0, int(most) - taken + int(told.get(cached, 0))) if most.isdecimal() else 2**63 - 1


def _fits(folder: Path, dtype: str, device: Any, memory_gib: float | None) -> bool:
    if isinstance(device, Mapping):
        return True
    one = one_device(device)
    if device in SPREAD and one.type == "cuda":
        free = sum(free_memory(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))
    else:
        free = free_memory(one)
    if one.type == "cpu" and memory_gib is not None:
        free = min(free, int(memory_gib * _GIB))
    return MARGIN * _whole_bytes(folder, dtype) <= free


def _whole_bytes(folder: Path, dtype: str) -> int:
    config, sizes = read_config(folder), checkpoint_sizes(folder)
    stated = config.get("dtype") or config.get("torch_dtype")
    itemsize = dtype_of(CheckpointReader(folder), stated, dtype).itemsize
    stored = sizes["expert_bytes"] / max(sizes["expert_parameters"], 1)
    return int((sizes["parameters"] + sizes["padding_bytes"] / stored) * itemsize)


def _hidden_bytes(model: StreamedModel, sequences: Sequence[TokenSequence], batch_size: int) -> int:
    """Of all batches, padding included."""
    lengths = [len(sequence.input_ids) for sequence in sequences]
    positions = 0
    for start in range(0, len(lengths), batch_size):
        positions += max(lengths[start : start + batch_size]) * len(lengths[start : start + batch_size])
    return positions * int(model.config.hidden_size) * model.model.dtype.itemsize


def _left_for_hidden_states(model: ModelByLayer, memory_gib: float | None) -> int:
    """Bytes of the host. Raises WinnowError where one layer does not fit."""
    layer, other = int(STACKING * model.layer_bytes()), model.other_bytes()
    host = int(free_memory(torch.device("cpu")) / MARGIN) if memory_gib is None else int(memory_gib * _GIB)
    told = f"one layer of {model.folder.name} at a time needs {(layer + other) / _GIB:.3g} GiB of memory"
    if model.device.type == "cpu":
        host -= layer + (other if memory_gib is not None else 0)  # what is loaded already is no longer free
        if host <= 0:
            had = f"calibration.memory_gib={memory_gib}" if memory_gib is not None else "what is free here"
            raise WinnowError(
                f"{told} and more for the text, but {had} is less: set calibration.memory_gib to at least "
                f"{MARGIN * (layer + other) / _GIB:.3g} on a machine that has it"
            )
    elif model.device.type == "cuda" and free_memory(model.device) < layer:
        raise WinnowError(
            f"{told}, but {model.device} has {free_memory(model.device) / _GIB:.3g} left: free it, or set "
            "model.device=cpu"
        )
    return host
