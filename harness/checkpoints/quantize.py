"""Quantization of a checkpoint's weights: a stage after any plan, shard by shard, without ever holding the model.

Round to nearest, in groups along the inputs; no activation is quantised. The layout is that of compressed-tensors
(``harness.checkpoints.packed_weights``), which hub checkpoints have and which vLLM and transformers read; writing it
needs nothing that is not installed with this project, and gives the bytes that compressed-tensors gives.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from harness.checkpoints import packed_weights as packed
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import config_integer, read_config
from harness.checkpoints.heap import give_large_blocks_back
from harness.checkpoints.layout import APPROXIMATE, layer_layouts
from harness.checkpoints.packed_weights import Scheme, kind_of
from harness.checkpoints.reader import CheckpointReader, Tensors
from harness.checkpoints.sizes import checkpoint_sizes
from harness.checkpoints.writer import WITH_ARRAYS, Output, copy_companions, write_shards, written_atomically
from harness.contracts.plan_files import PLAN
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of

log = logging.getLogger(__name__)

AUTOMATIC_GROUPS = (32, 16, 8)
_OFFERED = (256, 128, 64, 32, 16, 8, 4)


@dataclass(frozen=True)
class Quantization:
    """What becomes of the weights. ``bits``: 4 or 8; ``symmetric``: without zero points.

    ``group_size``: so many inputs share a scale; "row" gives all inputs of an output one scale; "auto" takes the
    largest of 32, 16 and 8 that divides the inputs of a kind of matrix (such as the down projections of all experts),
    or "row" where none does, as with experts of many widths. ``targets``: "experts", those of the routed experts, or
    "linear", also those of attention, dense layers and shared experts. Routers, norms, embeddings and the output head
    stay as they are.

    Raises WinnowError for an unknown option.
    """

    name: str
    bits: int
    symmetric: bool = True
    group_size: int | str = "auto"
    targets: str = "experts"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise WinnowError(f"quantize.bits={self.bits}: choose 4 or 8")
        if not isinstance(self.symmetric, bool):
            raise WinnowError(f"quantize.symmetric={self.symmetric}: choose true or false")
        is_number = isinstance(self.group_size, int) and not isinstance(self.group_size, bool) and self.group_size > 0
        if not is_number and self.group_size not in ("auto", "row"):
            raise WinnowError(f"quantize.group_size={self.group_size}: choose auto, row, or a number such as 32")
        if self.targets not in ("experts", "linear"):
            raise WinnowError(f"quantize.targets={self.targets}: choose experts or linear")

    @property
    def label(self) -> str:
        """Names the settings in ids and reports: ``int4-sym``, ``int8-g16-asym-linear``."""
        group = [] if self.group_size == "auto" else ["row" if self.group_size == "row" else f"g{self.group_size}"]
        where = [] if self.targets == "experts" else [self.targets]
        return "-".join([f"int{self.bits}", *group, "sym" if self.symmetric else "asym", *where])

    def check(self, family: Family, config: Mapping[str, Any]) -> None:
        """What can be said before there is a plan. Raises WinnowError where the model cannot be quantised so."""
        if packed.SECTION in config:
            raise WinnowError("the model is quantised already: give the unquantised one, or take quantize=none")
        if APPROXIMATE in config:
            raise WinnowError(
                f"quantize={self.name}: vLLM takes no quantised experts beside constants in layout=vllm_constants: "
                "use layout=compact, or quantize=none"
            )
        if family.stacks_experts:
            raise WinnowError(
                f"quantize={self.name}: '{family.model_type}' checkpoints stack the experts of a layer in one tensor, "
                "for which the pack-quantized layout has no place: take quantize=none"
            )
        self._schemes({"the gate and up projections": {config_integer(config, "hidden_size")}})

    def schemes(self, tensors: Tensors, family: Family, config: Mapping[str, Any]) -> dict[str, Scheme]:
        """The scheme of every kind of matrix that is quantised (``kind_of`` its name).

        Raises WinnowError where the group size does not divide the inputs of one.
        """
        inputs: dict[str, set[int]] = {}
        for name in _matrices(tensors, family, config, self.targets):
            inputs.setdefault(kind_of(name), set()).add(tensors.shape(name)[1])
        return self._schemes(inputs)

    def _schemes(self, inputs: Mapping[str, set[int]]) -> dict[str, Scheme]:
        if isinstance(self.group_size, int):
            for kind, sizes in inputs.items():
                misfits = sorted(size for size in sizes if size % self.group_size)
                if misfits:
                    raise WinnowError(self._misfit(kind, misfits, set.union(*inputs.values())))
        return {kind: Scheme(self.bits, self.symmetric, self._group(sizes)) for kind, sizes in inputs.items()}

    def _group(self, sizes: set[int]) -> int | None:
        if isinstance(self.group_size, int):
            return self.group_size
        choices = AUTOMATIC_GROUPS if self.group_size == "auto" else ()
        return next((group for group in choices if not any(size % group for size in sizes)), None)

    def _misfit(self, kind: str, misfits: list[int], all_inputs: set[int]) -> str:
        fitting = [group for group in _OFFERED if not any(size % group for size in all_inputs)]
        first = ", ".join(map(str, misfits[:3])) + (", ..." if len(misfits) > 3 else "")
        fit = f"{', '.join(map(str, fitting))} would fit" if fitting else "no size from 4 on fits"
        return (
            f"quantize.group_size={self.group_size} does not divide the inputs of {kind} ({first}): {fit}, and so do "
            "auto and row"
        )


def _matrices(tensors: Tensors, family: Family, config: Mapping[str, Any], targets: str) -> list[str]:
    """The names of the weights to quantise."""
    experts: dict[str, None] = {}
    layouts = layer_layouts(config, family)
    for layer, layout in layouts.items():
        for tensor in family.expert_tensors:
            if not tensor.is_bias:
                experts |= dict.fromkeys(tensor.names(layer, layout.numbers))
    if targets == "experts":
        return list(experts)
    routers = {template.format(layer=layer) for template in family.router_tensors for layer in layouts}
    return [name for name in tensors.names() if name in experts or (_is_linear(tensors, name) and name not in routers)]


def _is_linear(tensors: Tensors, name: str) -> bool:
    """A matrix inside a decoder layer, with more outputs than one: a shared expert's gate is a router of its own."""
    if not (name.startswith("model.layers.") and name.endswith(".weight")):
        return False
    shape = tensors.shape(name)
    return len(shape) == 2 and shape[0] > 1


def quantize_checkpoint(source: Path, target: Path, quantization: Quantization) -> dict[str, Any]:
    """Write ``source`` (plain or compact) with quantised weights to ``target``, which may be the same folder.

    ``target`` appears when it is complete; an existing checkpoint there is replaced. Holds one shard of what is new.

    Returns ``checkpoint_sizes`` of the target and, as ``quantization``, what was done: bits, symmetric, the group of
    every kind of matrix, and how many matrices, parameters and bytes are quantised. Raises WinnowError where the
    group size does not fit, or the source is quantised, has stacked experts or weights that are not finite.
    """
    source, target = Path(source), Path(target)
    config = read_config(source)
    family = family_of(config)
    quantization.check(family, config)
    check_checkpoint(source, family, config)
    give_large_blocks_back()
    reader = CheckpointReader(source)
    schemes = quantization.schemes(reader, family, config)
    names = _matrices(reader, family, config, quantization.targets)
    quantised = set(names)
    groups = {kind: scheme.group or "row" for kind, scheme in schemes.items()}
    log.info("%s: groups of %s", quantization.label, ", ".join(f"{g} in {_short(k)}" for k, g in groups.items()))

    @lru_cache(maxsize=1)  # the parts of a matrix are made one after the other
    def parts(name: str) -> dict[str, torch.Tensor]:
        return packed.packed_parts(reader.tensor(name), schemes[kind_of(name)])

    def part(name: str, which: str) -> Callable[[], torch.Tensor]:
        return lambda: parts(name)[which]

    def outputs(name: str) -> list[Output]:
        if name not in quantised:
            return [_same(reader, name)]
        module = name.removesuffix(".weight")
        stored = [(f"{module}.{which}", part(name, which)) for which in packed.part_names(schemes[kind_of(name)])]
        return [Output(stored_name, stored_name, make) for stored_name, make in stored]

    new_config = config | {packed.SECTION: packed.to_config(schemes)}
    _rewrite(reader, target, new_config, outputs, "quantizing")
    after = CheckpointReader(target)
    facts = {
        "bits": quantization.bits,
        "symmetric": quantization.symmetric,
        "groups": groups,
        "matrices": len(names),
        "parameters": sum(after.shape(name)[0] * after.shape(name)[1] for name in names),
        "bytes": sum(after.nbytes(name) for name in names),
    }
    return {**checkpoint_sizes(target), "quantization": facts}


def _short(kind: str) -> str:
    return kind.removesuffix(".weight").rpartition(".")[2]


@contextmanager
def served_folder(folder: Path) -> Iterator[Path]:
    """``folder`` itself or, while it lasts, a copy that every engine reads as this project does.

    That is one with the packed weights dequantised to the dtype of their scales (what computes with it computes with
    the quantised values, at the size of the unquantised model), and one that holds each tensor once where files of
    ``folder`` hold copies which the index leaves aside. It is in the system's folder for temporary files (TMPDIR).
    """
    if packed.SECTION not in read_config(folder) and not CheckpointReader(folder).is_ambiguous:
        yield folder
        return
    holder = Path(tempfile.mkdtemp(prefix="winnow-served-"))
    try:
        yield plain_copy(folder, holder / "checkpoint")
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def served_facts(folder: Path) -> dict[str, str]:
    """What the record's ``engine`` says of weights that an engine was not given as they are stored."""
    if packed.SECTION not in read_config(folder):
        return {}
    return {"weights": "dequantised: the quantised values at the size and speed of unquantised ones"}


def plain_copy(source: Path, target: Path) -> Path:
    """Write the checkpoint ``source`` to ``target``, each tensor once and unpacked; returns ``target``."""
    config = read_config(source)
    if packed.SECTION in config:
        packed.read_config_groups(config)  # raises for what is quantised in another way
    reader = CheckpointReader(source)
    unpacked_config = {key: value for key, value in config.items() if key != packed.SECTION}
    _rewrite(reader, target, unpacked_config, lambda name: [_same(reader, name)], "")
    return target


def _same(reader: CheckpointReader, name: str) -> Output:
    return Output(name, name, lambda: reader.tensor(name))


def _rewrite(
    reader: CheckpointReader,
    target: Path,
    config: Mapping[str, Any],
    outputs: Callable[[str], list[Output]],
    what: str,
) -> None:
    """Write what ``outputs`` makes of every tensor, in the shard that it was in; ``what`` stands before the bar."""
    shards: dict[Path, list[Output]] = {path: [] for path in reader.files}
    for name in reader.names():
        shards[reader.file_of(name)] += outputs(name)
    with written_atomically(target) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(reader.folder, folder)
        if (reader.folder / PLAN).is_file():
            shutil.copyfile(reader.folder / PLAN, folder / PLAN)
        if (reader.folder / WITH_ARRAYS).is_dir():
            shutil.copytree(reader.folder / WITH_ARRAYS, folder / WITH_ARRAYS)
        write_shards(folder, [shard for shard in shards.values() if shard], what, reader.let_go)
