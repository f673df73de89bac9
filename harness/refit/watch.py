"""What goes through the routed experts of one layer of the intact model, kept until the layer can be refitted."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.calibration.batches import BatchLayout
from harness.calibration.fused_experts import FusedExperts
from harness.calibration.routers import restricted, weights_of
from harness.checkpoints.offload import forward_replaced
from harness.contracts.plan import Array, LayerPlan
from harness.contracts.recovery import Fit
from harness.families.family import Family
from harness.families.moe_block import MoeBlock
from harness.refit.experts import CHUNK, Choices, Experts
from harness.refit.layer import Fitted, Tokens, fit_layer

CALIBRATION, HELD_OUT = "calibration", "held-out"  # sources of token sequences, in this order


@dataclass
class RefitWatch:
    """Observer (``harness.calibration.drive``) of the layer that ``plan`` is of, in the intact model.

    When the batches are through, ``fitted`` has the refitted layer. ``top_k`` is what tokens choose after the plan,
    ``stored`` the checkpoint's number format. Holds T x H numbers of the model's format on the host, and two times as
    many float32 ones on the device for the fit.
    """

    plan: LayerPlan
    fits: Sequence[Fit]
    family: Family
    top_k: int
    stored: torch.dtype
    all_tokens: int | None = None
    fitted: Fitted | None = None
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    @property
    def layer(self) -> int:
        return self.plan.layer

    @contextmanager
    def watching(self, block: MoeBlock) -> Iterator[None]:
        self._parts = []
        handle = block.experts.register_forward_pre_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()
        hidden, indices, gates, source = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        experts = Experts(FusedExperts(block.experts), self.stored)
        device = experts.fused.device
        choices = Choices(indices.to(device), gates.to(device))
        left = self._left(block, hidden, choices)
        tokens = Tokens(hidden, choices, source.to(device) == 1)
        self.fitted = fit_layer(self.plan, self.fits, experts, tokens, left, self.all_tokens)

    def start_batch(self, layout: BatchLayout) -> None:
        self._layout = layout

    def end_batch(self) -> None:
        pass  # what is not finite shows in the sums of the fit

    def state(self) -> dict[str, np.ndarray]:
        fitted = self.fitted
        assert fitted is not None
        downs = {f"down/{place}": new.down for place, new in enumerate(fitted.plan.experts) if new.down is not None}
        found = {name: array.values for name, array in downs.items()} | {CALIBRATION: np.array(fitted.calibration)}
        return found if fitted.heldout is None else found | {HELD_OUT: np.array(fitted.heldout)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        downs = {place: state.get(f"down/{place}") for place in range(len(self.plan.experts))}
        experts = tuple(
            new if (down := downs[place]) is None else replace(new, down=Array(down))
            for place, new in enumerate(self.plan.experts)
        )
        heldout = state[HELD_OUT].tolist() if HELD_OUT in state else None
        self.fitted = Fitted(replace(self.plan, experts=experts), state[CALIBRATION].tolist(), heldout)

    def _keep(self, module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        real = self._layout.real
        kept = (tensor[real.to(tensor.device)].detach().cpu() for tensor in args)
        self._parts.append((*kept, self._layout.source[real]))

    def _left(self, block: MoeBlock, hidden: Tensor, choices: Choices) -> Choices:
        """What each token chooses of the new experts: by the same router, without the rows that are removed."""
        route = self.plan.route
        rows = [row for row, new in enumerate(route) if new is not None]
        if len(rows) == len(route) and choices.gate.shape[1] == self.top_k:
            return choices.led(route)
        twin = copy.deepcopy(block.router)
        twin.top_k = self.top_k
        answer = restricted(twin, weights_of(block.router), self.family, rows, len(route))
        with forward_replaced(block.router, answer):
            return replay(block, hidden).led(route)


def replay(block: MoeBlock, hidden: Tensor) -> Choices:
    """What the block's router, as it is now, chooses for ``hidden`` (T, H); no expert is run."""
    found: list[tuple[Tensor, Tensor]] = []

    def catch(hidden: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        found.append((indices, gates))
        return torch.zeros_like(hidden)

    device = next(block.experts.parameters()).device
    with forward_replaced(block.experts, catch):
        for chunk in hidden.split(CHUNK):
            block.block(chunk.unsqueeze(0).to(device))
    return Choices(*(torch.cat(parts) for parts in zip(*found, strict=True)))
