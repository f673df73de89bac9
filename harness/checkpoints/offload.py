"""Where weights are: on one device, or moved to one by accelerate for a module's forward and away again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import SequentialHook
from torch import nn

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps by name: over all devices


def one_device(device: Any) -> torch.device:
    """Where a single layer goes: the first device of a device map, or of those that a name stands for."""
    if isinstance(device, Mapping):
        return one_device(next((place for place in device.values() if place not in ("cpu", "disk")), "cpu"))
    if isinstance(device, int):
        return torch.device("cuda", device)
    if device in SPREAD:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes: where its own weights are, or are brought to for its forward."""
    here = next(module.parameters()).device
    if here.type != "meta":
        return here
    hook = vars(module)["_hf_hook"]
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return torch.device(next(one.execution_device for one in hooks if one.execution_device is not None))


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Meanwhile the own weights of ``module`` are on its device, outside of its forward."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook = vars(module)["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile ``module`` runs ``forward`` in the place of its own, inside of accelerate's hook where it has one."""
    place = "_old_forward" if "_hf_hook" in vars(module) else "forward"
    before = vars(module).get(place)
    setattr(module, place, forward)
    try:
        yield
    finally:
        delattr(module, place)
        if before is not None:
            setattr(module, place, before)
