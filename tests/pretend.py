"""Pretend GPUs on a machine that has none: tensors that say they are on "cuda:0" or "cuda:1", computed on the CPU.

A tensor that is brought to a pretend GPU, or made there, is a ``Pretended``: a wrapper whose ``device`` is the GPU, so
code under test that asks for devices is answered as on a real one. ``PretendGpus`` raises where CUDA would (tensors of
two devices in one operation, a GPU's tensor read as numpy) and counts what makes the host wait for the GPU. Kernels are
those of the CPU; where CUDA would attend with a fused kernel, the plain one of torch runs.
"""

import os
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from transformers import PreTrainedModel

CPU = torch.device("cpu")
_ROOT = Path(__file__).parents[1]
# Operations whose result has a size, or is a number, that the host must know: it waits for the GPU.
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "transformers::grouped_mm_fallback",
}
_INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
# Beside those that torch tags as pointwise: they take a CPU tensor of no dimension as a number.
_TAKES_NUMBERS = ("aten::masked_fill", "aten::where", "aten::index_put", "aten::_index_put_impl_", "aten::fill")


# Methods that look for CUDA before they reach an operation, beside the brackets.
_UNGUARDED = {
    Tensor.contiguous: torch.ops.aten.contiguous,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.nonzero: torch.ops.aten.nonzero,
    torch.nonzero: torch.ops.aten.nonzero,
    Tensor.tolist: lambda tensor: tensor.cpu().tolist(),
    Tensor.__float__: lambda tensor: float(torch.ops.aten._local_scalar_dense(tensor)),
    Tensor.__int__: lambda tensor: int(torch.ops.aten._local_scalar_dense(tensor)),
    Tensor.__invert__: torch.ops.aten.bitwise_not,
}


class MixedDevicesError(RuntimeError):
    """What CUDA says of tensors on several devices in one operation."""


class Pretended(Tensor):
    """A tensor on a pretend GPU; ``inner`` is where it really is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes a parameter anew as one of the class that it had
            return nn.Parameter(inner, requires_grad)
        with torch.inference_mode(False):  # what is a view of a weight must not be an inference tensor; ``inner`` may
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=device, requires_grad=False,
            )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Brackets go here: torch's own code for them looks for CUDA, where it is linked with none."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__getitem__:
                view, indices = _viewed(*args)
                return torch.ops.aten.index(view, indices) if indices else view
            if func is Tensor.__setitem__:
                tensor, index, value = args
                view, indices = _viewed(tensor, index)
                if not indices:
                    return torch.ops.aten.copy_(view, value) if isinstance(value, Tensor) else view.fill_(value)
                value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=tensor.dtype)
                return torch.ops.aten.index_put_(view, indices, value)
            return _UNGUARDED.get(func, func)(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of a pretend GPU outlives the pretence")


class PretendGpus(TorchDispatchMode):
    """Meanwhile there are ``count`` GPUs. ``waits``, ``uploads`` and ``moves`` count, by operation and line of code,
    what makes the host wait, is copied from the host, or goes from one GPU to another."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()

    def __enter__(self) -> "PretendGpus":
        if not getattr(self, "_entered", 0):
            self._stack = ExitStack()
            torch._C._ensureCUDADeviceGuardSet()
            # As FakeTensorMode: ``torch.tensor`` makes its tensor on the host, and we see it brought to the GPU.
            before = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)
            self._stack.callback(torch._C._set_only_lift_cpu_tensors, before)
            # Else ``Module.to`` writes into parameters, which stay of the class that they are.
            overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwritten)
            # Other threads know nothing of a mode; those of transformers load weights.
            self._stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
            for name, answer in (("_lazy_init", None), ("get_device_capability", (9, 0)), ("empty_cache", None)):
                self._stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        self._entered = getattr(self, "_entered", 0) + 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered -= 1
        if not self._entered:
            self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = next((one for one in tree_iter((args, kwargs)) if isinstance(one, torch.device)), None)
        wanted = None if named is None else self._numbered(named)
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        if not any(isinstance(one, Pretended) for one in tensors) and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        name = func.name()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            with self:  # inference mode hands them over whole
                return func.decompose(*args, **kwargs)
        if name == "aten::_fused_sdp_choice":
            return torch.nn.attention.SDPBackend.MATH.value
        device = self._device(func, name, tensors, wanted)
        if name == "aten::histc" and not tensors[0].is_floating_point():  # the CPU's kernel knows no integers
            return Pretended(func(args[0].inner.float(), *args[1:], **kwargs).to(tensors[0].dtype), device)
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        known = {id(one.inner): one for one in tensors if isinstance(one, Pretended)}
        for one in known.values():
            assert one.shape == one.inner.shape and one.stride() == one.inner.stride(), f"{name} changes a shape"

        def outside(made: Any) -> Any:
            if not isinstance(made, Tensor) or id(made) in known:
                return known.get(id(made), made) if isinstance(made, Tensor) else made
            return Pretended(made, device) if device.type == "cuda" else made

        return tree_map(outside, result)

    def _device(self, func: Any, name: str, tensors: list[Tensor], wanted: torch.device | None) -> torch.device:
        """Where the result is. Raises MixedDevicesError as CUDA does."""
        if name in ("aten::copy_", "aten::_to_copy"):
            target = tensors[0].device if name == "aten::copy_" else wanted or tensors[0].device
            self._count_copy(name, tensors[-1].device, target)
            return target
        if wanted is not None:  # made new, perhaps like another
            return wanted
        first, rest = tensors[0], tensors[1:]
        indexing = name.startswith(_INDEXING)
        if indexing and first.is_cuda:  # CUDA brings indices along
            here = [one for one in rest if one.is_cuda or one.dtype.is_floating_point]
            self.uploads[f"{name} at {_line()}"] += len(rest) - len(here)
            tensors = [first, *here]
        takes_numbers = torch.Tag.pointwise in func.tags or name.startswith(_TAKES_NUMBERS)
        written = func._schema.arguments[0].is_write
        gpus = {one.device for one in tensors if one.is_cuda}
        on_host = [one for one in tensors if not one.is_cuda]
        if (
            len(gpus) > 1
            or any(one.dim() > 0 or not takes_numbers for one in on_host)
            or (not first.is_cuda and (written or indexing))
        ):
            found = ", ".join(sorted({str(one.device) for one in tensors}))
            raise MixedDevicesError(f"{name}: tensors on {found}, at {_line()}")
        masked = indexing and any(one.dtype in (torch.bool, torch.uint8) for one in rest)
        filled = "put" in name and rest[-1].numel() == 1
        if name in _WAITS or (masked and not filled):
            self.waits[f"{name} at {_line()}"] += 1
        return next(iter(gpus))

    def _count_copy(self, name: str, source: torch.device, target: torch.device) -> None:
        if source != target and "meta" not in (source.type, target.type):
            kinds = (source.type, target.type)
            counts = {("cuda", "cpu"): self.waits, ("cpu", "cuda"): self.uploads, ("cuda", "cuda"): self.moves}
            counts[kinds][f"{name} {source} to {target} at {_line()}"] += 1

    def _numbered(self, device: torch.device) -> torch.device:
        if device.type != "cuda":
            return device
        index = device.index or 0
        if index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {self.count}")
        return torch.device("cuda", index)


def _viewed(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What numbers, slices, None and dots of ``tensor[index]`` leave, and the tensors that index it further."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(1 if not isinstance(one, Tensor) or one.dtype != torch.bool else one.dim() for one in parts
               if one is not None and one is not ...)  # fmt: skip
    if any(one is ... for one in parts):
        place = next(i for i, one in enumerate(parts) if one is ...)
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - used)
    view, indices, dim = tensor, [], 0
    for one in parts:
        if one is None:
            view = view.unsqueeze(dim)
            indices.append(None)
            dim += 1
        elif isinstance(one, slice):
            bounds = (None if bound is None else int(bound) for bound in (one.start, one.stop, one.step or 1))
            view = torch.ops.aten.slice(view, dim, *bounds)
            indices.append(None)
            dim += 1
        elif isinstance(one, (Tensor, list, np.ndarray)) and not (
            isinstance(one, Tensor) and one.dim() == 0 and one.dtype != torch.bool
        ):
            found = torch.as_tensor(one)
            indices.append(found)
            dim += found.dim() if found.dtype == torch.bool else 1
        elif isinstance(one, bool):
            raise NotImplementedError("a truth value as an index")
        else:
            view = view.select(dim, int(one))
    return view, indices if any(one is not None for one in indices) else []


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return value.inner if isinstance(value, Pretended) else value


def _line() -> str:
    """The innermost line of the project's own code."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(_ROOT)}:{frame.lineno} {frame.line}"
    return "?"


def placed(model: PreTrainedModel, gpus: int) -> PreTrainedModel:
    """``model`` on the pretend GPU 0; or on two, as accelerate splits a model that one GPU does not hold: with hooks
    that bring along what a layer is given."""
    if gpus == 1:
        return model.to("cuda:0")
    return dispatch_model(model, halves(model), main_device="cuda:0", force_hooks=True)


def halves(model: PreTrainedModel) -> dict[str, str]:
    """The device map that has the embedding and the first half of the decoder layers on GPU 0, the rest on GPU 1."""
    prefix, layers = model.base_model_prefix, len(model.base_model.layers)
    where = {f"{prefix}.layers.{layer}": f"cuda:{int(layer >= layers // 2)}" for layer in range(layers)}
    others = [name for name, _ in model.base_model.named_children() if name != "layers"]
    where |= {f"{prefix}.{name}": f"cuda:{int('embed' not in name)}" for name in others}
    return where | {name: "cuda:1" for name, _ in model.named_children() if name != prefix}
