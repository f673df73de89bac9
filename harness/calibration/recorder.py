"""What hangs on an MoE block while a model runs its own forward, and shows the collectors what happens there.

A recorder sees the router's output and stands in for the experts' forward. It knows no statistic: it hands events
(``harness.calibration.collectors.events``) to the collectors that see them. The outputs of the experts are computed
once, for routed tokens only, from the indices and gate values that the block hands over, and not at all for padding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.calibration.batches import BatchLayout
from harness.calibration.collected import AffineStep
from harness.calibration.collectors.collector import Collector
from harness.calibration.collectors.events import (
    AllTokens,
    BatchStart,
    BlockOutput,
    Event,
    PairActivations,
    PairOutputs,
    RoutedPairs,
    RouterOutput,
    WeightedOutputs,
)
from harness.calibration.collectors.pairs import Usage
from harness.calibration.collectors.released import MovingAverage
from harness.calibration.fused_experts import FusedExperts
from harness.checkpoints.offload import forward_replaced, weights_at_hand
from harness.errors import WinnowError
from harness.families.moe_block import MoeBlock

# Not statistics: sums that turn NaN or infinite where anything that the layer computes does.
_LOGITS, _OUTPUTS = "router logits", "expert outputs"


@dataclass
class Recorder:
    """Observer (``harness.calibration.drive``) of the MoE block of ``layer``.

    ``router_output`` names what the router returns (``Family.router_output``). ``make`` gives the collectors, once the
    experts are there; ``sigmoid`` is the router's (``Family.sigmoid_router``). ``arrays`` holds the statistics of all
    collectors when the block has been watched, ``usage`` (sources, E) the routed tokens of each source, and ``steps``
    what the pass does to moving averages.
    """

    layer: int
    router_output: tuple[str, ...]
    make: Callable[[FusedExperts], Sequence[Collector]]
    collectors: Sequence[Collector] = ()
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    usage: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    steps: dict[str, AffineStep] = field(default_factory=dict)
    sigmoid: bool = False

    @contextmanager
    def watching(self, block: MoeBlock) -> Iterator[None]:
        if hasattr(block.experts, "standins"):
            raise WinnowError(
                f"calibration: layer {self.layer} has constants or low-rank maps in the place of experts, of which no "
                "statistics are taken: calibrate the original model"
            )
        self.experts = FusedExperts(block.experts)
        self.device = self.experts.device
        self.collectors = self.make(self.experts)
        self.health = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in (_LOGITS, _OUTPUTS)}
        self.pairs: RoutedPairs | None = None
        with ExitStack() as stack:
            stack.callback(block.router.register_forward_hook(self._see_router).remove)
            stack.callback(block.decoder_layer.register_forward_hook(self._see_block).remove)
            stack.enter_context(forward_replaced(block.experts, self.experts_forward))
            yield
        with weights_at_hand(block.experts):
            self.arrays = {name: array for each in self.collectors for name, array in each.arrays().items()}
        for each in self.collectors:
            if isinstance(each, Usage):
                self.usage = each.counts.cpu().numpy()
            elif isinstance(each, MovingAverage):
                self.steps[each.name] = each.affine
        self.collectors = ()  # a pass by layers has many recorders, and their sums are on the device

    def state(self) -> dict[str, np.ndarray]:
        """All that is known of the layer when it has been watched."""
        steps = {
            f"{half}/{name}": getattr(step, half)
            for name, step in self.steps.items()
            for half in ("decay", "from_zero")
        }
        return {"usage": self.usage, **steps, **{f"statistic/{name}": array for name, array in self.arrays.items()}}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.usage = state["usage"]
        for key, array in state.items():
            half, _, name = key.partition("/")
            if half == "statistic":
                self.arrays[name] = array
            elif half == "decay":
                self.steps[name] = AffineStep(array, state[f"from_zero/{name}"])

    def start_batch(self, layout: BatchLayout) -> None:
        self.layout = layout.to(self.device)
        self._show(BatchStart(self.layout))

    def end_batch(self) -> None:
        """Raises WinnowError that names the layer and what is NaN or infinite in it."""
        named = {name: value for each in self.collectors for name, value in each.running().items()} | self.health
        finite = torch.stack([torch.isfinite(value).all() for value in named.values()]).tolist()
        bad = [name for name, good in zip(named, finite, strict=True) if not good]
        if bad:
            # where the layer's own sums are broken, say so first: the statistics follow from them
            first = next((name for name in self.health if name in bad), bad[0])
            wrong = sorted(set(bad) - self.health.keys())
            raise WinnowError(
                f"calibration: NaN or infinite {first} in layer {self.layer}"
                + (f" (statistics {', '.join(wrong)})" if wrong else "")
                + "; check the model's weights, or calibrate in float32 if they overflow in its dtype"
            )

    def experts_forward(self, hidden: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """The experts' forward: ``hidden`` (N, H), ``indices`` and ``gates`` (N, k) -> (N, H), zero on padding.

        Where products are grouped: the same ones, in the same order, as ``grouped_mm_experts_forward`` of transformers.
        """
        layout, experts = self.layout, self.experts
        positions, top_k = indices.shape
        pairs = self.pairs = self._sorted(indices, gates)
        self._show(pairs)
        gate_up = experts.gate_up(hidden[pairs.token], pairs.ends, pairs.expert)
        activations = experts.activations(gate_up)
        self._show(PairActivations(pairs, hidden, gate_up, activations))
        del gate_up
        output = experts.down(activations, pairs.ends, pairs.expert)
        self._show(PairOutputs(pairs, output, hidden, activations))
        self._show(AllTokens(hidden, layout))
        gate = pairs.gate.unsqueeze(1)
        weighted = output.mul_(gate) if gate.dtype == output.dtype else output * gate
        unsorted = weighted.new_zeros(positions * top_k, weighted.shape[1])
        unsorted[pairs.order] = weighted
        slots = unsorted.view(positions, top_k, -1)
        result = slots.sum(1).to(hidden.dtype)
        self._show(WeightedOutputs(pairs, activations, weighted, slots, result))
        self.health[_OUTPUTS] += result.sum(dtype=torch.float32)
        return result

    def _sorted(self, indices: Tensor, gates: Tensor) -> RoutedPairs:
        layout, experts, top_k = self.layout, self.experts.num_experts, indices.shape[1]
        if layout.padded:  # padding goes behind the last expert, and is cut off there
            indices = indices.masked_fill(~layout.real.unsqueeze(1), experts)
        expert, order = torch.sort(indices.reshape(-1))
        expert, order = expert[: layout.tokens * top_k], order[: layout.tokens * top_k]
        ends = torch.bincount(expert, minlength=experts).cumsum(0, dtype=torch.int32)
        return RoutedPairs(expert, order // top_k, gates.reshape(-1)[order], order, ends, layout)

    def _see_router(self, module: Any, args: Any, output: Any) -> None:
        named = dict(zip(self.router_output, output, strict=True))
        event = RouterOutput(args[0], named["logits"], named["gates"], named["indices"], self.layout, self.sigmoid)
        self._show(event)
        self.health[_LOGITS] += event.real_logits.sum(dtype=torch.float64)

    def _see_block(self, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.pairs is not None:
            self._show(BlockOutput(self.pairs, hidden.reshape(-1, hidden.shape[-1])))
            self.pairs = None

    def _show(self, event: Event) -> None:
        for collector in self.collectors:
            if type(event) in collector.sees:
                collector.add(event)
