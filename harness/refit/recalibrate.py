"""Router rows, layer by layer, for what the compressed model gives the router (methods_3.md, 6).

H hidden size, E' rows. x is what the intact model gives the router, x' what the compressed one gives it, R are the rows
that stay. R' minimises sum_t |R' x'_t - R x_t|^2 + lambda |R' - R|^2; lambda is alpha * trace(sum_t x'_t x'_t^T) / H.
It repairs drift, not the loss of experts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness import progress
from harness.calibration.batches import Batch, BatchLayout, in_batches
from harness.calibration.streamed import StreamedModel
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import stored_rows
from harness.checkpoints.by_layer import ModelByLayer
from harness.contracts.plan import Array, CompressionPlan, LayerPlan
from harness.contracts.recovery import Recalibration
from harness.errors import WinnowError
from harness.families.moe_block import MoeBlock, moe_block
from harness.refit.run import Refitted, check_memory, counted, marked, within
from harness.refit.solve import ridge


@dataclass
class Sums:
    """Over tokens: ``gram`` (H, H) of x', ``cross`` (E', H) of R x with x', ``energy`` of R x, and how many."""

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """``x`` (n, H) of the compressed model, ``wanted`` (n, E') logits of the intact one."""
        x, wanted = x.double(), wanted.double()
        self.gram += x.T @ x
        self.cross += wanted.T @ x
        self.energy += float(wanted.square().sum())

    def error(self, rows: Tensor) -> float:
        """sum_t |rows x'_t - R x_t|^2 / sum_t |R x_t|^2"""
        lost = self.energy - 2 * float((rows * self.cross).sum()) + float(((rows @ self.gram) * rows).sum())
        return max(lost, 0.0) / self.energy if self.energy else 0.0


def recalibrate(
    intact: StreamedModel,
    compressed: StreamedModel,
    plan: CompressionPlan,
    asked: Recalibration,
    sequences: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence] = (),
    batch_size: int = 8,
) -> Refitted:
    """``plan``, which has made ``compressed`` of ``intact``, with router rows for what the layers before now compute.

    Both models go through side by side, one layer at a time; routers behind see what those before, already changed,
    give. Told are the relative squared errors of the logits before and after on both texts, and the mean of what a
    token's gate values add up to. Raises WinnowError where the text does not fit the memory, and where sums are not
    finite.
    """
    text = marked(within(sequences, asked.tokens), held_out)
    check_memory(intact, text, batch_size, 4)
    batches = list(in_batches(text, batch_size))
    tokens = sum(batch.layout.tokens for batch in batches)
    both = _Passing(intact.model, batches), _Passing(compressed.model, batches)
    layers, told = {layer.layer: layer for layer in plan.layers}, {}
    depth = max(layers) + 1
    with progress.bar("router", depth * tokens, unit="token") as bar, torch.inference_mode():
        for layer in range(depth):
            if layer in layers:
                try:
                    layers[layer], told[str(layer)] = _one(layers[layer], *both, asked.alpha)
                except WinnowError as error:
                    raise WinnowError(f"router={asked.name}, layer {layer}: {error}") from None
            else:
                for passing in both:
                    with passing.model.layer(layer):
                        passing.through(layer)
            bar.update(tokens)
    found = CompressionPlan(tuple(layers[layer.layer] for layer in plan.layers))
    return Refitted(found, {"alpha": asked.alpha, **counted(text), "layers": told})


def _one(plan: LayerPlan, intact: "_Passing", compressed: "_Passing", alpha: float) -> tuple[LayerPlan, dict[str, Any]]:
    stored = stored_rows(plan)
    wanted: list[Tensor] = []
    with intact.model.layer(plan.layer):
        matrix = intact.matrix(plan.layer)
        rows = matrix[torch.tensor(stored, device=matrix.device)].double()
        intact_mass = intact.through(plan.layer, lambda x, _: wanted.append((x.double() @ rows.T).float().cpu()))
    calibration, held_out = (Sums(rows.new_zeros(rows.shape[1], rows.shape[1]), torch.zeros_like(rows)) for _ in "12")
    turn = iter(wanted)

    def see(x: Tensor, layout: BatchLayout) -> None:
        logits, source = next(turn).to(x.device), layout.source[layout.real].to(x.device)
        for place, sums in enumerate((calibration, held_out)):
            sums.add(x[source == place], logits[source == place])

    with compressed.model.layer(plan.layer):
        matrix = compressed.matrix(plan.layer)
        mass = compressed.through(plan.layer, see, keep=False)
        fitted = ridge(calibration.gram, calibration.cross, rows, alpha)
        matrix.copy_(fitted)
        new_mass = compressed.through(plan.layer)
    told = {
        "calibration": [calibration.error(rows), calibration.error(fitted)],
        "heldout": [held_out.error(rows), held_out.error(fitted)] if held_out.energy else None,
        "gate_mass": {"intact": intact_mass, "as_is": mass, "recalibrated": new_mass},
    }
    in_order = fitted[torch.tensor([stored.index(row) for row in sorted(stored)], device=fitted.device)]
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return replace(plan, router=Array(in_order.to(dtype).cpu().numpy())), told


class _Passing:
    """All batches on their way through a model, layer by layer."""

    def __init__(self, model: ModelByLayer, batches: Sequence[Batch]) -> None:
        self.model, self._batches = model, batches
        self._hidden: list[Tensor | None] = [None] * len(batches)

    def block(self, layer: int) -> MoeBlock:
        return moe_block(self.model.skeleton, self.model.family, layer)

    def matrix(self, layer: int) -> Tensor:
        """The router's: a parameter of the name that the checkpoint's tensor ends with."""
        leaf = self.model.family.router_tensors[0].rpartition(".")[2]
        named = self.block(layer).router.named_parameters()
        found: Tensor = next(each.data for name, each in named if name.rpartition(".")[2] == leaf and each.ndim == 2)
        return found

    def through(
        self, layer: int, see: Callable[[Tensor, BatchLayout], object] | None = None, keep: bool = True
    ) -> float:
        """Through ``layer``, whose weights are there, and back again unless they are to be kept. ``see`` is given what
        the router gets, (n, H). Returns what the gate values of a token add up to, on the mean of the text fitted to;
        0 in a layer without experts."""
        total, count = 0.0, 0

        def see_router(module: Any, args: Any, output: Any) -> None:
            nonlocal total
            real = layout.real.to(args[0].device)
            if see is not None:
                see(args[0].reshape(-1, args[0].shape[-1])[real], layout)
            gates = output[self.model.family.router_output.index("gates")]
            total += float(gates[real & (layout.source == 0).to(real.device)].sum(dtype=torch.float64))

        with ExitStack() as stack:
            if layer in self.model.family.moe_layers(self.model.config.to_dict()):
                stack.callback(self.block(layer).router.register_forward_hook(see_router).remove)
            for place, batch in enumerate(self._batches):
                layout = batch.layout
                count += int((layout.real & (layout.source == 0)).sum())
                behind = self.model.run(layer, self._hidden[place], batch.inputs(self.model.device))
                if keep:
                    self._hidden[place] = behind.cpu()
        return total / count
