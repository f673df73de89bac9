"""Where router rows lead in vLLM: stored experts, and the constants and low-rank maps that stand for others.

A route to a constant gets the weight 0 in vLLM's kernel, whichever stored expert it is given, and gate value times
constant is added to what the experts compute. So the sum passes through all that follows as theirs does: the scaling
of the output, shared experts, the sum over devices. All maps of a layer are computed for every token, in two matrix
products of their ranks together (that of a dense layer of R / 2 channels), and weighted with 0 where a token did not
choose them: shapes are fixed, so that graphs of a GPU hold them. Sums are float32. Nothing of this was run on a GPU.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints.layout import APPROXIMATE, LayerLayout, layer_layouts
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.standins import IS_ONE, LEFT, RIGHT, SHIFT, experts_prefix, map_name, read_constants
from harness.families.family import Family
from harness.families.table import family_of


class Route(nn.Module):
    """What the (T, k) rows that tokens chose lead to, by ``layout``.

    Rows that are none (vLLM's kernels on GPUs mark tokens that only fill up a batch with -1; the type may be unsigned)
    stay what they are: no expert computes them.
    """

    expert: Tensor  # (rows,) the stored expert of a row; any for a constant
    computes: Tensor  # (rows,) whether that expert is part of what the row leads to
    standin: Tensor  # (rows,) the constant or map of a row, or their number

    def __init__(self, layout: LayerLayout, device: Any) -> None:
        super().__init__()
        bases = [one.base for one in layout.low_rank]
        experts: list[int | None] = [*range(layout.experts), *[None] * layout.constants, *bases]
        none = layout.constants + len(layout.low_rank)
        standins = [none] * layout.experts + list(range(none))
        self.register_buffer("expert", torch.tensor([experts[to] or 0 for to in layout.route], device=device), False)
        computes = torch.tensor([experts[to] is not None for to in layout.route], device=device)
        self.register_buffer("computes", computes, False)
        self.register_buffer("standin", torch.tensor([standins[to] for to in layout.route], device=device), False)

    def forward(self, rows: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Stored experts (T, k) and their gate values, 0 where a row leads to none."""
        known, chosen = self._known(rows)
        experts = torch.where(known, self.expert[chosen], rows.long()).to(rows.dtype)
        return experts, torch.where(known & ~self.computes[chosen], 0, gates)

    def shares(self, rows: Tensor, gates: Tensor, count: int) -> Tensor:
        """(T, count) float32: the gate values of each constant and map."""
        known, chosen = self._known(rows)
        given = torch.where(known, gates, 0).float()
        shares = torch.zeros(len(rows), count + 1, dtype=torch.float32, device=rows.device)
        return shares.scatter_add_(1, self.standin[chosen], given)[:, :count]

    def _known(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = rows.long()
        known = (chosen >= 0) & (chosen < len(self.expert))
        return known, torch.where(known, chosen, 0)


class StandIns(nn.Module):
    """The constants and maps of a layer, read from the checkpoint in ``folder``: V = constants + maps, R ranks."""

    vectors: Tensor  # (V, H): constants, and the shifts of maps
    left: Tensor  # (H, R)
    right: Tensor  # (R, H)
    owner: Tensor  # (R,) the place in ``vectors`` of the map that a rank is of

    def __init__(
        self, folder: Path, family: Family, layer: int, layout: LayerLayout, dtype: torch.dtype, device: Any
    ) -> None:
        super().__init__()
        reader, prefix, count = CheckpointReader(folder), experts_prefix(family, layer), len(layout.low_rank)
        left = [reader.tensor(map_name(prefix, number, LEFT)) for number in range(count)]
        right = [reader.tensor(map_name(prefix, number, RIGHT)) for number in range(count)]
        constants = read_constants(reader, family, layer, layout)
        vectors = [] if constants is None else [constants]
        for number, one in enumerate(layout.low_rank):
            name = map_name(prefix, number, SHIFT)
            vectors.append((reader.tensor(name) if one.shift else torch.zeros_like(left[number][:, 0]))[None])
        owners = [layout.constants + number for number, one in enumerate(layout.low_rank) for _ in range(one.rank)]
        kept = {"vectors": torch.cat(vectors).to(device, dtype), "owner": torch.tensor(owners, device=device)}
        if count:
            kept |= {"left": torch.cat(left, 1).to(device, dtype), "right": torch.cat(right).to(device, dtype)}
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, False)

    def forward(self, hidden: Tensor, shares: Tensor) -> Tensor:
        """(T, H) float32: what they add for inputs ``hidden`` (T, H) and ``shares`` (T, V)."""
        total = shares @ self.vectors.float()
        if len(self.owner):
            mapped = (hidden.float() @ self.right.float().T) * shares[:, self.owner]
            total = total + mapped @ self.left.float().T
        return total

    @property
    def stored_bytes(self) -> int:
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "owner")


def led(base: Any, route: Route, standins: StandIns | None) -> Any:
    """``base`` (vLLM's ``RoutedExperts``), given rows where it was given experts.

    ``standins`` is None where there are none, and on all devices but the first of those that share the experts'
    channels: what they compute is summed, and this is to be added once.
    """

    class LedExperts(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.route, self.standins = route, standins

        def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **options: Any) -> Any:
            added = None
            if self.standins is not None:  # before the kernel, which may write over its input
                shares = self.route.shares(topk_ids, topk_weights, len(self.standins.vectors))
                added = self.standins(x, shares)
            experts, gates = self.route(topk_ids, topk_weights)
            output = super().forward_modular(x, gates, experts, *args, **options)
            return output if added is None else (output + added).to(output.dtype)

    LedExperts.__name__ = LedExperts.__qualname__ = base.__name__
    return LedExperts


def as_built(original: Any) -> Any:
    """vLLM's iterator over all weights of a checkpoint, by the numbers that the experts have in the model, and without
    those that no model of vLLM knows."""

    def weights(loader: Any, model_config: Any, model: Any) -> Any:
        config = model_config.hf_text_config.to_dict()
        numbered = _numbers_in_model(config) if APPROXIMATE in config else {}
        for name, tensor in original(loader, model_config, model):
            if not IS_ONE.search(name):
                yield numbered.get(name, name), tensor

    return weights


def _numbers_in_model(config: dict[str, Any]) -> dict[str, str]:
    """The names of experts that keep their old numbers in the checkpoint -> those that they have as they come."""
    family = family_of(config)
    return {
        name: built
        for layer, layout in layer_layouts(config, family).items()
        for tensor in family.expert_tensors
        for name, built in zip(tensor.names(layer, layout.numbers), tensor.names(layer, layout.experts), strict=True)
    }
