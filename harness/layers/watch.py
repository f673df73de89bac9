"""What goes through the routed experts of a layer, token by token, before and after a plan; the outputs of all experts.

T tokens, k top-k, E experts, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.calibration.batches import BatchLayout
from harness.checkpoints.offload import device_of, weights_at_hand
from harness.contracts.plan import LayerPlan
from harness.families.moe_block import MoeBlock
from harness.layers import theory
from harness.layers.theory import GroupSums

_ELEMENTS = 2**24  # of the outputs of all experts that are held at once
_CHUNK = 1024  # tokens that a block is given at once


@dataclass
class Passed:
    """What went through the routed experts of one layer, token by token.

    ``hidden`` (T, H) is what the block was given, ``indices`` (T, k) are stored experts, ``gates`` (T, k) multiply
    their outputs, ``output`` (T, H) is the sum.
    """

    hidden: Tensor
    indices: Tensor
    gates: Tensor
    output: Tensor

    @staticmethod
    def joined(parts: Sequence["Passed"]) -> "Passed":
        names = ("hidden", "indices", "gates", "output")
        return Passed(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def dense_gates(self, experts: int) -> np.ndarray:
        """(T, E), 0 where an expert is not chosen; gate values that lead to one expert are added up."""
        dense = torch.zeros(len(self.gates), experts, dtype=torch.float64)
        return dense.scatter_add_(1, self.indices, self.gates.double()).numpy()


@dataclass
class Outputs:
    """Of all experts on all tokens: ``spread`` (T,), ``square_norms`` (T, E), and ``gram`` (E, E), the mean inner
    products."""

    spread: np.ndarray
    square_norms: np.ndarray
    gram: np.ndarray


@dataclass
class Original:
    """What is kept of a layer of the original model; ``groups`` are the sums of each merged group by new expert."""

    passed: Passed
    outputs: Outputs
    groups: dict[int, GroupSums] = field(default_factory=dict)


@dataclass
class Watch:
    """Observer (``harness.calibration.drive``) of the layer that ``plan`` is of, in the original model.

    When the batches are through, ``original`` has what went through the experts and what all of them make of it;
    ``folds`` (T,) are those of the tokens. ``done`` is called then.
    """

    plan: LayerPlan
    folds: np.ndarray
    done: Callable[[], object] = lambda: None

    @property
    def layer(self) -> int:
        return self.plan.layer

    @contextmanager
    def watching(self, block: MoeBlock) -> Iterator[None]:
        with _kept(block.experts, lambda: self.real) as parts:
            yield
        passed = Passed.joined(parts)
        self.original = survey_original(block.experts, passed, self.plan, self.folds)
        self.done()

    def start_batch(self, layout: BatchLayout) -> None:
        self.real = layout.real

    def end_batch(self) -> None:
        pass  # NaN and infinity show in the numbers of the layer


@contextmanager
def _kept(experts: nn.Module, real: Callable[[], Tensor | slice]) -> Iterator[list[Passed]]:
    """Meanwhile what goes through ``experts`` is kept, of the flat positions ``real()``."""
    parts: list[Passed] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept = real()
        hidden, indices, gates = args  # after any pre-hook: rows have been led to the stored experts
        # Copies: blocks add their shared experts to the same memory.
        parts.append(Passed(*(tensor[kept].detach().cpu().clone() for tensor in (hidden, indices, gates, output))))

    handle = experts.register_forward_hook(keep)
    try:
        yield parts
    finally:
        handle.remove()


def replay(block: MoeBlock, hidden: Tensor) -> Passed:
    """What goes through the experts when their block, router and all, is given ``hidden`` (T, H)."""
    device = device_of(block.experts)
    with _kept(block.experts, lambda: slice(None)) as parts:
        for chunk in hidden.split(_CHUNK):
            block.block(chunk.unsqueeze(0).to(device))
    return Passed.joined(parts)


def survey(
    experts: nn.Module,
    hidden: Tensor,
    count: int,
    visit: Callable[[slice, np.ndarray], None] = lambda tokens, outputs: None,
) -> Outputs:
    """``Outputs`` of the first ``count`` experts for ``hidden`` (T, H); ``visit`` sees all outputs on the way."""
    found = Outputs(np.zeros(len(hidden)), np.zeros((len(hidden), count)), np.zeros((count, count)))
    with weights_at_hand(experts):
        for tokens, outputs in _all_outputs(experts, hidden, count):
            found.spread[tokens] = theory.spread(outputs)
            found.square_norms[tokens] = np.einsum("eth,eth->te", outputs, outputs)
            flat = outputs.reshape(count, -1)
            found.gram += flat @ flat.T / len(hidden)
            visit(tokens, outputs)
    return found


def survey_original(experts: nn.Module, passed: Passed, plan: LayerPlan, folds: np.ndarray) -> Original:
    """The groups that ``plan`` merges are followed token by token; ``folds`` (T,)."""
    count = len(plan.route)
    gates = passed.dense_gates(count)
    rows_of = rows_by_expert(plan)
    groups = {new: GroupSums.empty(len(rows)) for new, rows in rows_of.items() if len(rows) > 1}

    def visit(tokens: slice, outputs: np.ndarray) -> None:
        for new, sums in groups.items():
            rows = rows_of[new]
            sums.add(gates[tokens][:, rows], outputs[rows], folds[tokens])

    return Original(passed, survey(experts, passed.hidden, count, visit), groups)


def rows_by_expert(plan: LayerPlan) -> dict[int, list[int]]:
    """New expert -> the old router rows that lead to it."""
    return {new: [row for row, to in enumerate(plan.route) if to == new] for new in range(len(plan.experts))}


def _all_outputs(experts: nn.Module, hidden: Tensor, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(tokens, outputs (count, n, H)) of every expert, chosen or not, a few tokens at a time; float64.

    By the forward of the experts' class: that of the instance may be accelerate's, which moves the weights each time.
    """
    device, forward = device_of(experts), type(experts).forward
    step = max(1, _ELEMENTS // (count * hidden.shape[1]))
    for start in range(0, len(hidden), step):
        chunk = hidden[start : start + step].to(device)
        gate = chunk.new_ones(len(chunk), 1)
        outputs = [
            forward(experts, chunk, torch.full((len(chunk), 1), expert, device=device), gate).double().cpu()
            for expert in range(count)
        ]
        yield slice(start, start + len(chunk)), torch.stack(outputs).numpy()
