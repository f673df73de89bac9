"""How the gate values of a token compare with its largest: what thresholds for skipping experts are set by."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from harness.calibration.batches import BatchLayout
from harness.calibration.drive import drive
from harness.calibration.tokens import TokenSequence
from harness.checkpoints import skipping
from harness.families.family import Family
from harness.families.moe_block import MoeBlock


@dataclass
class GateRatios:
    """Observer that counts the gate values of ``layer``; ``place`` is where the router's output has them."""

    layer: int
    place: int
    counts: np.ndarray = field(default_factory=lambda: np.zeros(skipping.BINS, dtype=np.int64))

    @contextmanager
    def watching(self, block: MoeBlock) -> Iterator[None]:
        hook = block.router.register_forward_hook(self._count)
        try:
            yield
        finally:
            hook.remove()

    def start_batch(self, layout: BatchLayout) -> None:
        self.real = layout.real

    def end_batch(self) -> None:
        pass

    def _count(self, module: Any, args: Any, output: Any) -> None:
        gates = output[self.place]
        self.counts += skipping.count_ratios(gates[self.real.to(gates.device)]).cpu().numpy()


def gate_ratio_counts(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    family: Family,
    batch_size: int = 8,
    corpus: str = "",
) -> dict[int, np.ndarray]:
    """Layer -> (BINS,): the gate values of the tokens relative to their largest (``skipping.count_ratios``).

    One pass. ``model`` may be compressed; raises WinnowError as ``collect`` does where the sequences do not fit it.
    """
    place = family.router_output.index("gates")
    observers = [GateRatios(layer, place) for layer in family.moe_layers(model.config.to_dict())]
    drive(model, family, sequences, observers, batch_size, f"gate values{f' over {corpus}' if corpus else ''}")
    return {observer.layer: observer.counts for observer in observers}
