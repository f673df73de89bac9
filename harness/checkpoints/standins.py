"""What stands for experts in a layer: constants and low-rank maps, how a checkpoint names them, and how they compute.

Beside the tensors of the experts of a layer, under the same prefix: ``constants`` (C, H), or in vLLM's layout one
``N.approx_value`` (H,) for each old expert N that a constant stands for, and of each map N
``low_rank.N.left`` (H, r), ``.right`` (r, H) and ``.shift`` (H,). A router row that leads to a constant adds gate value
times constant; one that leads to a map gate value times (left right x + shift), and where it has a base, of what that
expert computes. Gate values are the router's, and nothing is renormalised.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.checkpoints.layout import LayerLayout
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.plan import NewExpert
from harness.families.family import Family

CONSTANTS, LEFT, RIGHT, SHIFT = "constants", "left", "right", "shift"
APPROX_VALUE = "approx_value"
NO_PLACE = "layout=expanded has no place for constants and low-rank maps: use layout=compact"
ONLY_CONSTANTS = (
    "layout=vllm_constants takes whole experts and constants, each in its old row, from checkpoints that name every "
    "expert's matrices: use layout=compact"
)
# Names of such tensors, whatever the prefix is called.
IS_ONE = re.compile(r"\.experts\.(constants|low_rank\.\d+\.(left|right|shift)|\d+\.approx_value)$")


def experts_prefix(family: Family, layer: int) -> str:
    """What the names of the tensors of a layer's experts begin with, up to a dot."""
    name = family.expert_tensors[0].name
    start = name.rpartition(".")[0] + "." if family.expert_tensors[0].is_stacked else name.partition("{expert}")[0]
    return start.format(layer=layer)


def map_name(prefix: str, number: int, part: str) -> str:
    return f"{prefix}low_rank.{number}.{part}"


def standin_shapes(family: Family, layer: int, layout: LayerLayout, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's constants and maps, by name."""
    prefix = experts_prefix(family, layer)
    found: dict[str, tuple[int, ...]] = {}
    if layout.kept:
        found |= {f"{prefix}{old}.{APPROX_VALUE}": (hidden,) for old in layout.approximated}
    elif layout.constants:
        found[prefix + CONSTANTS] = (layout.constants, hidden)
    for number, one in enumerate(layout.low_rank):
        found[map_name(prefix, number, LEFT)] = (hidden, one.rank)
        found[map_name(prefix, number, RIGHT)] = (one.rank, hidden)
        if one.shift:
            found[map_name(prefix, number, SHIFT)] = (hidden,)
    return found


def standin_arrays(
    standins: Sequence[NewExpert], family: Family, layer: int, layout: LayerLayout
) -> dict[str, np.ndarray]:
    """What those tensors hold, from a plan's constants and maps in the order of ``layout``."""
    prefix, found = experts_prefix(family, layer), dict[str, np.ndarray]()
    constants = [new.constant.values for new in standins if new.constant is not None]
    if layout.kept:
        found |= {f"{prefix}{n}.{APPROX_VALUE}": v for n, v in zip(layout.approximated, constants, strict=True)}
    elif constants:
        found[prefix + CONSTANTS] = np.stack(constants)
    for number, low in enumerate(new.low_rank for new in standins if new.low_rank is not None):
        parts = {LEFT: low.left, RIGHT: low.right, SHIFT: low.shift}
        found |= {map_name(prefix, number, part): array.values for part, array in parts.items() if array is not None}
    return found


def read_constants(reader: CheckpointReader, family: Family, layer: int, layout: LayerLayout) -> Tensor | None:
    """(C, H), None where there are none."""
    if layout.kept:
        return torch.stack([reader.tensor(name) for name in standin_shapes(family, layer, layout, 1)])
    return reader.tensor(experts_prefix(family, layer) + CONSTANTS) if layout.constants else None


class StandIns(nn.Module):
    """The constants and maps of a layer, and which stored row leads to what; (N, H) inputs, (N, k) rows and gates.

    Sums are float32 or better.
    """

    route: Tensor  # (rows,) as in ``LayerLayout``

    def __init__(
        self, reader: CheckpointReader, family: Family, layer: int, layout: LayerLayout, dtype: torch.dtype
    ) -> None:
        super().__init__()
        prefix = experts_prefix(family, layer)
        self.experts, self.constant_count, self.maps = layout.experts, layout.constants, layout.low_rank
        hidden = {name: reader.tensor(name).to(dtype) for name in standin_shapes(family, layer, layout, 1)}
        constants = read_constants(reader, family, layer, layout)
        self._keep("route", torch.tensor(layout.route))
        self._keep(CONSTANTS, None if constants is None else constants.to(dtype))
        for number in range(len(layout.low_rank)):
            for part in (LEFT, RIGHT, SHIFT):
                self._keep(f"{part}_{number}", hidden.get(map_name(prefix, number, part)))
        count = layout.constants
        parked = [0] * count + [one.base or 0 for one in layout.low_rank]
        passes = [False] * count + [one.base is not None for one in layout.low_rank]
        self._keep("parked", torch.tensor([*range(layout.experts), *parked]))
        self._keep("computed", torch.tensor([True] * layout.experts + passes))

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else tensor.clone(), persistent=False)

    def to_experts(self, rows: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Stored experts and gate values for the experts' own forward: 0 where a row leads to no expert."""
        target = self._here("route", rows)[rows]
        return self._here("parked", rows)[target], gates * self._here("computed", rows)[target].to(gates.dtype)

    def forward(self, hidden: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        """(N, H): what constants and maps add."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        target = self._here("route", rows)[rows] - self.experts  # below 0: an expert
        total = torch.zeros(hidden.shape, dtype=precise, device=hidden.device)
        constants, count = self._here(CONSTANTS, rows), self.constant_count
        stands = (target >= 0).to(precise) * gates.to(precise)
        shares = torch.zeros(len(rows), count + len(self.maps), dtype=precise, device=hidden.device)
        shares.scatter_add_(1, target.clamp(min=0), stands)
        if constants is not None:
            total += shares[:, :count] @ constants.to(precise)
        for number in range(len(self.maps)):
            share = shares[:, count + number]
            chosen = torch.nonzero(share).squeeze(1)
            if len(chosen):
                left, right, shift = (self._here(f"{part}_{number}", rows) for part in (LEFT, RIGHT, SHIFT))
                mapped = hidden[chosen].to(precise) @ right.to(precise).T @ left.to(precise).T
                if shift is not None:
                    mapped += shift.to(precise)
                total.index_add_(0, chosen, share[chosen].unsqueeze(1) * mapped)
        return total

    def _here(self, name: str, like: Tensor) -> Any:
        buffer = getattr(self, name)
        return None if buffer is None else buffer.to(like.device)


def install(
    experts: Any, folder: Path, family: Family, layer: int, layout: LayerLayout, dtype: torch.dtype, device: Any
) -> None:
    """Have the experts' module of a layer lead rows to what is stored, constants and maps among it."""
    standins = StandIns(CheckpointReader(folder), family, layer, layout, dtype).to(device)
    experts.standins = standins
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, rows, gates = args
        seen.append((hidden_states, rows, gates))
        return hidden_states, *standins.to_experts(rows, gates)

    def behind(module: Any, args: Any, output: Tensor) -> Tensor:
        hidden_states, rows, gates = seen.pop()
        return (output + standins(hidden_states, rows, gates)).to(output.dtype)

    experts.register_forward_pre_hook(before)
    experts.register_forward_hook(behind)
