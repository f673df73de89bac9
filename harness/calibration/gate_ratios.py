"""How the gate values of a token compare with its largest: what thresholds for skipping experts are set by."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from harness.calibration.batches import _batches
from harness.calibration.drive import _check_fit, _forward
from harness.calibration.tokens import TokenSequence
from harness.checkpoints import skipping
from harness.families.family import Family


def gate_ratio_counts(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    family: Family,
    batch_size: int = 8,
    progress: bool = True,
    corpus: str = "",
) -> dict[int, np.ndarray]:
    """Layer -> (BINS,): the gate values of the tokens relative to their largest (``skipping.count_ratios``).

    One pass. ``model`` may be compressed; raises WinnowError as ``collect`` does where the sequences do not fit it.
    """
    _check_fit(model, sequences, family, batch_size)
    gates_at = family.router_output.index("gates")
    counts = {layer: np.zeros(skipping.BINS, dtype=np.int64) for layer in family.moe_layers(model.config.to_dict())}
    real = torch.zeros(0, dtype=torch.bool)

    def count(layer: int, module: torch.nn.Module, args: Any, output: Any) -> None:
        gates = output[gates_at]
        counts[layer] += skipping.count_ratios(gates[real.to(gates.device)]).cpu().numpy()

    name = f"gate values{f' over {corpus}' if corpus else ''}"
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    bar = tqdm(total=tokens, unit="token", unit_scale=True, desc=name, disable=not progress)
    model.eval()
    with ExitStack() as stack, bar, torch.inference_mode():
        for layer in counts:
            router = model.get_submodule(family.block.format(layer=layer)).get_submodule(family.router)
            stack.callback(router.register_forward_hook(partial(count, layer)).remove)
        for batch in _batches(sequences, sorted({s for sequence in sequences for s in sequence.sources}), batch_size):
            real = batch.layout.real
            _forward(model, batch)
            bar.update(batch.layout.tokens)
    return counts
