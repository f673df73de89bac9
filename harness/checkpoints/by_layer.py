"""A model of which one decoder layer at a time has its weights: for those that are larger than memory.

The model's own forward runs for every layer and batch: the layers before hand their input on, the layer itself is given
the hidden states that were kept, and what comes behind it is not run. So masks, positions and the kinds of layers are
made by transformers, and nothing here knows an architecture.
"""

import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from harness import progress
from harness.checkpoints.building import (
    check_report,
    experts_padded_where_ragged,
    heed_layouts,
    layers_built_as_stored,
    loading_faults,
    standins_left_to_us,
)
from harness.checkpoints.check import check_checkpoint, check_names
from harness.checkpoints.config import read_config
from harness.checkpoints.heap import give_large_blocks_back
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.packed_weights import SECTION as QUANTISED
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.skipping import read_betas
from harness.errors import WinnowError
from harness.families.table import family_of

_HEAD = "head"  # the matrix that scores the vocabulary
_FIRST = "first"  # all else outside of the layers, the embedding above all


class ModelByLayer:
    """The checkpoint in ``folder`` as a transformers model on torch's meta device, with the embedding on ``device``.

    ``skeleton`` is that model, built as ``load_model`` builds it: compact layouts, routes and thresholds for skipping
    are heeded. ``layers`` brings the weights of one decoder layer after the other in and takes them out again. Packed
    weights are dequantised as they are read. ``dtype`` as in ``load_model``.

    Raises WinnowError as ``load_model`` does, also for tensors that are missing, before anything is read.
    """

    def __init__(
        self, folder: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
    ) -> None:
        give_large_blocks_back()
        self.folder = resolve_checkpoint(folder)
        self.device = torch.device(device)
        raw = read_config(self.folder)
        self.family = family_of(raw)
        check_checkpoint(self.folder, self.family, raw)
        check_names(self.folder, raw)
        self._layouts = layer_layouts(raw, self.family)
        self._reader = CheckpointReader(self.folder)
        with loading_faults(self.folder), layers_built_as_stored(self.family, self._layouts):
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            vars(config).pop(QUANTISED, None)  # the reader takes care of it
            self.dtype = dtype_of(self._reader, config.dtype, dtype)
            with torch.device("meta"):
                self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        self._mapping = get_model_conversion_mapping(self.skeleton)
        with loading_faults(self.folder):
            self._check_complete()
            self._places = self._places_of_tensors()
            self._make_buffers()
            heed_layouts(self.skeleton, self.family, self._layouts, read_betas(raw), self.folder)
            self._load(_FIRST)

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return len(self._decoder_layers)

    @property
    def _embedding(self) -> Any:
        return self.skeleton.get_input_embeddings()

    @property
    def _prefix(self) -> str:
        return self.family.block.partition("{layer}")[0]

    @property
    def _decoder_layers(self) -> nn.ModuleList:
        found: Any = self.skeleton.get_submodule(self._prefix.rstrip("."))
        return found

    def layer_bytes(self) -> int:
        """What the largest decoder layer takes in memory."""
        return max(map(_bytes, self._decoder_layers))

    def other_bytes(self) -> int:
        """What stays in memory meanwhile: the embedding, above all."""
        return sum(tensor.nbytes for _, tensor in _stored(self.skeleton) if not tensor.is_meta)

    def layers(self, wanted: Iterable[int]) -> Iterator[int]:
        """Each of the layers ``wanted`` while its weights are there; those of the next one are read ahead.

        Read ahead are the files, into the system's cache, so that no second layer takes memory of the process.
        """
        order = list(wanted)
        for layer, following in zip(order, [*order[1:], None], strict=False):
            with self._reading_ahead(following), self.layer(layer):
                yield layer

    @contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        """Meanwhile the weights of ``layer`` are there."""
        with torch.inference_mode(False), torch.no_grad():
            self._load(layer)
        try:
            yield
        finally:
            _forget(self._decoder_layers[layer])

    @contextmanager
    def head(self) -> Iterator[None]:
        """Meanwhile the output embedding is there, so that ``logits`` can be asked for."""
        output: Any = self.skeleton.get_output_embeddings()
        with torch.inference_mode(False), torch.no_grad():
            self._load(_HEAD)
            if self._tied:
                output.weight = self._embedding.weight
        try:
            yield
        finally:
            _forget(output)

    def run(self, layer: int, hidden: Tensor | None, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """(B, L, H): a batch behind ``layer``, whose weights are there, from ``hidden`` (B, L, H) before it.

        ``inputs`` are ``input_ids`` (B, L) and, where there are any, ``attention_mask`` and ``position_ids``, as the
        model takes them. Without ``hidden`` the layer is given what the layers before hand on: the embedding.
        """
        found: list[Any] = []
        module = self._decoder_layers[layer]

        def leave(module: Any, args: Any, output: Any) -> None:
            found.append(output)
            raise _Through

        with self._handing_on(layer, hidden), contextlib.ExitStack() as stack:
            stack.callback(module.register_forward_hook(leave).remove)
            with contextlib.suppress(_Through):
                self.skeleton.base_model(**self._there(inputs), use_cache=False)
        (output,) = found
        if not isinstance(output, Tensor):
            raise WinnowError(f"the layers of a {self.family.model_type} model cannot be run one by one: stream=never")
        return output

    def logits(self, hidden: Tensor, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """(B, L, V): the model's answer from ``hidden`` (B, L, H) behind the last layer, inside of ``head``."""
        with self._handing_on(self.depth, hidden):
            answer: Any = self.skeleton(**self._there(inputs), use_cache=False)
        return answer.logits

    @contextmanager
    def _handing_on(self, layer: int, hidden: Tensor | None) -> Iterator[None]:
        """Meanwhile the layers before ``layer`` hand on what they are given, and the last of them ``hidden``."""
        before = self._decoder_layers[:layer]
        for module in before:
            module.forward = _hand_on
        if before and hidden is not None:
            there = hidden.to(self.device)
            before[-1].forward = lambda *args, **kwargs: there
        try:
            yield
        finally:
            for module in before:
                vars(module).pop("forward", None)

    def _there(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: None if tensor is None else tensor.to(self.device) for name, tensor in inputs.items()}

    # --- reading --------------------------------------------------------------------------------------------------

    def _check_complete(self) -> None:
        """Tensors of all layers, as shapes alone: are they what the model needs?"""
        names = self._reader.names()
        shapes = {name: torch.empty(self._reader.shape(name), dtype=self.dtype, device="meta") for name in names}
        info = self._convert(shapes, "meta")
        self.skeleton.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        with standins_left_to_us():
            self.skeleton._adjust_missing_and_unexpected_keys(info)
        faults = ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")
        check_report(self.folder, {name: getattr(info, name) for name in faults})
        output: Any = self.skeleton.get_output_embeddings()
        self._tied = output.weight is self._embedding.weight

    def _places_of_tensors(self) -> dict[int | str, dict[str, list[str]]]:
        """Decoder layer, or ``_FIRST`` or ``_HEAD`` -> the checkpoint's tensors in it, those apart that become one.

        What the model does not know (layers for multi-token prediction) is left out.
        """
        found: dict[int | str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        state = self.skeleton.state_dict()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        in_layer = re.compile(re.escape(self._prefix) + r"(\d+)\.")
        output = self.skeleton.get_output_embeddings()
        head = tuple(f"{name}." for name, module in self.skeleton.named_modules() if module is output)
        for name in self._reader.names():
            becomes, pattern = rename_source_key(name, renamings, converters, self.skeleton.base_model_prefix, state)
            if becomes not in state:
                continue
            layer = in_layer.match(becomes)
            place = int(layer[1]) if layer else _HEAD if becomes.startswith(head) else _FIRST
            if place == _HEAD and self._tied:
                continue
            found[place]["" if pattern is None else becomes].append(name)
        return found

    def _make_buffers(self) -> None:
        """What no file holds, such as rotary tables: made by the model itself, as loading does."""
        for module in self.skeleton.modules():
            names = module._non_persistent_buffers_set
            for name in names:
                buffer = module._buffers[name]
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
            if names:
                with torch.no_grad():
                    self.skeleton._init_weights(module)

    def _load(self, place: int | str) -> None:
        groups = self._places.get(place, {})
        for names in sorted(
            groups.values(), key=len, reverse=True
        ):  # the largest stack first: it takes most on the way
            state = {name: self._reader.tensor(name) for name in names}
            info = self._convert(state, str(self.device))
            if info.conversion_errors or info.mismatched_keys:
                raise WinnowError(f"{self.folder}: {names[0]} cannot be read as its config.json implies")
        self._reader.let_go()

    def _convert(self, state: Mapping[str, Tensor], device: str) -> Any:
        options = LoadStateDictConfig(
            device_map={"": device},
            dtype=self.dtype,
            dtype_plan=self.skeleton._get_dtype_plan(self.dtype),
            weight_mapping=self._mapping,  # type: ignore[arg-type]
        )
        with experts_padded_where_ragged(self._layouts), progress.showing(False):  # a bar a layer is too many
            info, _ = convert_and_load_state_dict_in_model(self.skeleton, dict(state), options)
        return info

    @contextmanager
    def _reading_ahead(self, layer: int | None) -> Iterator[None]:
        names = [name for group in self._places.get(layer, {}).values() for name in group] if layer is not None else []
        stop = threading.Event()
        thread = threading.Thread(target=self._reader.read_ahead, args=(names, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class _Through(Exception):
    """The batch is behind the layer that was asked for."""


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def dtype_of(reader: CheckpointReader, stated: str | torch.dtype | None, dtype: str | torch.dtype) -> torch.dtype:
    """``dtype`` itself, or for "auto" the one that config.json has ``stated``, or that of the first tensor."""
    wanted = stated if dtype == "auto" and stated is not None else dtype
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    tensors = map(reader.tensor, reader.names())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that a checkpoint holds."""
    yield from module.state_dict(keep_vars=True).items()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in _stored(module))


def _forget(module: nn.Module) -> None:
    """Back to the meta device with what a checkpoint holds; the rest stays."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = torch.empty_like(buffer, device="meta")
