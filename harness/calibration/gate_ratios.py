"""How the gate values of a token compare with its largest: what thresholds for skipping experts are set by."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.calibration.batches import BatchLayout
from harness.calibration.drive import check_fit, drive
from harness.calibration.streamed import Model, chunks
from harness.calibration.tokens import TokenSequence
from harness.calibration.unfinished import kept
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

    def state(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.counts = state["counts"]

    def _count(self, module: Any, args: Any, output: Any) -> None:
        gates = output[self.place]
        self.counts += skipping.count_ratios(gates[self.real.to(gates.device)]).cpu().numpy()


def gate_ratio_counts(
    model: Model,
    sequences: Sequence[TokenSequence],
    family: Family,
    batch_size: int = 8,
    corpus: str = "",
) -> dict[int, np.ndarray]:
    """Layer -> (BINS,): the gate values of the tokens relative to their largest (``skipping.count_ratios``).

    One pass, or of a streamed model one for each part of the sequences whose hidden states fit. ``model`` may be
    compressed; raises WinnowError as ``collect`` does where the sequences do not fit it.
    """
    check_fit(model, family, sequences, batch_size)
    place, layers = family.router_output.index("gates"), family.moe_layers(model.config.to_dict())
    counts = dict.fromkeys(layers, np.zeros(skipping.BINS, dtype=np.int64))
    with kept(model, sequences, None, {"gate ratios": skipping.BINS, "batch_size": batch_size}) as folder:
        for some, part in chunks(model, sequences, batch_size):
            observers = [GateRatios(layer, place) for layer in layers]
            state = None if folder is None else folder / f"{part.offset}-{len(some)}"
            label = f"gate values{f' over {corpus}' if corpus else ''}"
            drive(model, family, some, observers, batch_size, label, state)
            counts = {observer.layer: counts[observer.layer] + observer.counts for observer in observers}
    return counts
