"""Who computes on which device: one process at a time, of all that this user's winnow runs on the machine."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness.files import locked


@contextmanager
def alone_on(device: Any) -> Iterator[None]:
    """Meanwhile no other process is in such a context for a device of ``device``; waits for those that are.

    ``device`` is one of torch's, a GPU's number, a device map by name ("auto": all GPUs) or from modules to devices. A
    CPU is for everybody. The locks go with the process that holds them.
    """
    with ExitStack() as stack:
        for name in sorted(_names(device)):  # always in the same order: two processes never hold what the other wants
            lock = Path(tempfile.gettempdir()) / f"winnow-device-{os.getuid()}-{name}.lock"
            stack.enter_context(locked(lock, f"waiting for the device {name}: another cell computes on it"))
        yield


def _names(device: Any) -> set[str]:
    """The physical devices, as file names."""
    if isinstance(device, Mapping):
        return {name for one in device.values() for name in _names(one)}
    kind, _, number = str(device).partition(":")
    if kind in ("cpu", "disk", "meta"):
        return set()
    if kind in ("mps", "xpu"):
        return {kind}
    visible = _visible()
    if kind.isdecimal() or kind == "cuda":
        place = int(kind if kind.isdecimal() else number or 0)
        return {visible[place] if place < len(visible) else str(place)}
    return set(visible)


def _visible() -> list[str]:
    """The GPUs that this process sees, by number or unique name."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]
