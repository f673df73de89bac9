"""Checkpoint folders in the hub layout: read tensor by tensor and checked by their headers.

A *plain* checkpoint is what stock transformers loads. A *compact* one stores every merged expert once, and
may have another number of experts and other widths in each layer; the section ``"winnow"`` of its
config.json describes it (``width``: one number for all experts of the layer, or in a *ragged* layer one for each;
``route``: the stored expert of each stored router row)::

    {"version": 1, "layers": {"0": {"experts": 3, "width": 768, "route": [0, 1, 0, 2]},
                              "1": {"experts": 2, "width": [768, 512], "route": [0, 0, 1, 0]}, ...}}

Its other keys stay as they were, so that stock transformers refuses it for its shapes.
``harness.checkpoints.apply_plan`` writes both, ``harness.checkpoints.load`` loads both. Either may be quantised
(``harness.checkpoints.quantize``): its packed matrices (``harness.checkpoints.packed_weights``) are read here by the
names, and with the shapes, that they had
before."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from harness.checkpoints import packed_weights as packed
from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError
from harness.families.table import Family, family_of, read_config
from harness.families.tensors import ExpertTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECTION = "winnow"


class CheckpointReader:
    """The safetensors files of ``folder``, mapped into memory: a tensor costs nothing until it is used.

    A packed matrix goes by the name of its weight. Raises WinnowError where there are no weights, a shard is missing,
    a file is truncated or corrupt, or config.json does not say how packed matrices are to be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.files = _weight_files(self.folder)
        self._file: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        for path in self.files:
            try:
                # safe_open compares the file's length with its header, so a truncated shard is found here
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise WinnowError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error
            self._file |= dict.fromkeys(self._handles[path].keys(), path)
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
            return tuple(self._handles[self._file_with(name)].get_slice(name).get_shape())
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
        return self._handles[self._file_with(name)].get_tensor(name)

    def _parts(self, name: str, scheme: packed.Scheme) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        return {part: self._stored(f"{module}.{part}") for part in packed.part_names(scheme)}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise WinnowError(f"no weights in {folder}: expected {WEIGHTS} or shards with {INDEX}")
    try:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WinnowError(f"{index} is not a valid index of shards: {error!r}") from error
    for path in files:
        if not path.is_file():
            raise WinnowError(f"shard {path.name} is missing from {folder}, though {INDEX} names it: fetch it again")
    return files


@dataclass(frozen=True)
class LayerLayout:
    """What is stored of one MoE layer: expert e has ``widths[e]`` channels, router row r leads to ``route[r]``."""

    widths: tuple[int, ...]
    route: tuple[int, ...]

    @property
    def experts(self) -> int:
        return len(self.widths)

    @property
    def rows(self) -> int:
        return len(self.route)

    @property
    def width(self) -> int:
        """That of the widest expert."""
        return max(self.widths)

    @property
    def is_ragged(self) -> bool:
        return len(set(self.widths)) > 1

    def padded_to(self, width: int) -> "LayerLayout":
        return LayerLayout((width,) * self.experts, self.route)

    @property
    def is_direct(self) -> bool:
        """Row r leads to expert r: an ordinary MoE layer."""
        return self.route == tuple(range(self.experts))


def layer_layouts(config: Mapping[str, Any], family: Family) -> dict[int, LayerLayout]:
    """The layout of every MoE layer, plain or compact. Raises WinnowError for a broken config."""
    try:
        moe_layers = family.moe_layers(config)
        if SECTION not in config:
            count = family.num_experts(config)
            widths = (int(config[family.width_key]),) * count
            return dict.fromkeys(moe_layers, LayerLayout(widths, tuple(range(count))))
        if config[SECTION]["version"] != 1:
            raise WinnowError(f"config.json: layout version {config[SECTION]['version']} is newer than this winnow")
        stored = config[SECTION]["layers"]
        layouts = {
            layer: LayerLayout(_stored_widths(layer, stored[str(layer)]), tuple(stored[str(layer)]["route"]))
            for layer in moe_layers
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WinnowError(f"config.json does not describe a complete model: {error!r}") from error
    for layer, layout in layouts.items():
        if not layout.experts or set(layout.route) != set(range(layout.experts)):
            raise WinnowError(f"config.json: the route of layer {layer} does not fit its {layout.experts} experts")
    return layouts


def _stored_widths(layer: int, stored: Mapping[str, Any]) -> tuple[int, ...]:
    experts, width = int(stored["experts"]), stored["width"]
    widths = tuple(width) if isinstance(width, list) else (int(width),) * experts
    if len(widths) != experts:
        raise WinnowError(f"config.json: layer {layer} has {experts} experts, but {len(widths)} widths")
    if any(type(w) is not int or w < 1 for w in widths):
        raise WinnowError(f"config.json: the width of layer {layer} must be whole numbers of at least 1, not {width}")
    return widths


def config_integer(config: Mapping[str, Any], key: str) -> int:
    """A whole number of config.json. Raises WinnowError where it is absent."""
    if not isinstance(config.get(key), int):
        raise WinnowError(f"config.json does not describe a complete model: it has no {key}")
    return int(config[key])


def check_checkpoint(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Compare the MoE tensors that config.json announces with the headers of the files; reads no values.

    Raises WinnowError for every fault named under ``CheckpointReader``, for a missing tensor, one of another
    shape, and for tensors among the experts that the family does not know (more experts, fused or quantised).
    """
    reader = CheckpointReader(folder)
    layouts = layer_layouts(config, family)
    hidden = config_integer(config, "hidden_size")
    expected: dict[str, tuple[int, ...]] = {}
    for layer, layout in layouts.items():
        for tensor in family.expert_tensors:
            parts = [tensor.shape(width, hidden) for width in layout.widths]
            shapes = [(len(parts), *parts[0])] if tensor.is_stacked else parts
            expected |= dict(zip(tensor.names(layer, layout.experts), shapes, strict=True))
        for template in family.router_tensors:
            name = template.format(layer=layer)
            expected[name] = (layout.rows, *reader.shape(name)[1:])
        for name in router_biases(reader, family, layer):
            expected[name] = (*reader.shape(name)[:-1], layout.rows)
    prefixes = tuple({t.name.split("{expert}")[0].format(layer=n) for t in family.expert_tensors for n in layouts})
    unknown = [name for name in reader.names() if name.startswith(prefixes) and name not in expected]
    if unknown:
        raise WinnowError(
            f"{folder} has expert tensors that its config.json does not account for, such as {unknown[0]}: "
            "more experts than announced, or a fused or quantised layout; save it again with save_pretrained"
        )
    for name, announced in expected.items():
        found = reader.shape(name)
        if found != announced:
            raise WinnowError(f"{folder}: {name} has shape {found}, but config.json implies {announced}")


def router_biases(reader: CheckpointReader, family: Family, layer: int) -> list[str]:
    """The biases of a router that the checkpoint has: settings of the model may leave them out."""
    names = (template.format(layer=layer) for template in family.router_biases)
    return [name for name in names if name in reader]


def expert_part(reader: CheckpointReader, tensor: ExpertTensor, layer: int, expert: int) -> torch.Tensor:
    """What ``tensor`` holds of one expert, of ``ExpertTensor.shape``; a view of the mapped file."""
    name = tensor.name.format(layer=layer, expert=expert)
    return reader.tensor(name)[expert] if tensor.is_stacked else reader.tensor(name)


def expert_weights_reader(folder: Path, family: Family) -> Callable[[int, int], ExpertWeights]:
    """A function (layer, expert) -> the expert's matrices (no biases) in float32, read when it is called."""
    reader = CheckpointReader(folder)

    def read(layer: int, expert: int) -> ExpertWeights:
        found: dict[str, Any] = {}
        for tensor in family.expert_tensors:
            if tensor.is_bias or tensor.channel_axis is None:
                continue
            channels = expert_part(reader, tensor, layer, expert).movedim(tensor.channel_axis, 0)
            count = len(tensor.matrices)
            for place, matrix in enumerate(tensor.matrices):
                rows = channels[place::count] if tensor.interleaved else channels.chunk(count)[place]
                found[matrix] = (rows.T if matrix == "down" else rows).float().numpy()
        return ExpertWeights(**found)

    return read


def widened(part: torch.Tensor, tensor: ExpertTensor, width: int, wider: int) -> torch.Tensor:
    """One expert's part of ``width`` channels with channels of zeros behind them, ``wider`` in all.

    Exact: a channel of zeros has a gate of zero, and adds nothing to the expert's output.
    """
    axis = tensor.channel_axis
    if axis is None or width == wider:
        return part
    shape = list(part.shape)
    shape[axis] = wider * len(tensor.matrices)
    places = torch.tensor(tensor.places(range(width), wider))
    return part.new_zeros(shape).index_copy_(axis, places, part)


def padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``matrix`` with zeros below and to its right. Exact for an expert: a channel of zeros adds silu(0) * 0 = 0."""
    if matrix.shape == (rows, columns):
        return matrix
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Sizes of a checkpoint as stored: plain or compact, quantised or not.

    ``weight_bytes`` the weight files on disk, ``largest_shard_bytes`` the largest of them, ``parameters`` all
    elements (a packed weight is one), ``expert_bytes`` and ``expert_parameters`` those of the routed experts (with the
    scales and zero points of packed ones). ``padding_bytes`` (not on
    disk) what padding every expert to the widest of its layer adds in the stored dtype, as ``load_model`` does.
    """
    config, reader = read_config(folder), CheckpointReader(folder)
    family = family_of(config)
    expert_names: list[str] = []
    padding_bytes = 0
    for layer, layout in layer_layouts(config, family).items():
        for tensor in family.expert_tensors:
            names = tensor.names(layer, layout.experts)
            expert_names += names
            if layout.is_ragged:  # one expert a tensor
                sizes = zip(map(reader.nbytes, names), layout.widths, strict=True)
                padding_bytes += sum(nbytes // width * (layout.width - width) for nbytes, width in sizes)
    file_sizes = [path.stat().st_size for path in reader.files]
    return {
        "weight_bytes": sum(file_sizes),
        "largest_shard_bytes": max(file_sizes),
        "parameters": sum(math.prod(reader.shape(name)) for name in reader.names()),
        "expert_bytes": sum(reader.nbytes(name) for name in expert_names),
        "expert_parameters": sum(math.prod(reader.shape(name)) for name in expert_names),
        "padding_bytes": padding_bytes,
    }
