"""What one calibration pass measures, layer by layer: the only thing, beside a ratio, that a method sees."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from harness.errors import WinnowError

# name -> shape and meaning. E experts, H hidden size; t runs over the T non-padding tokens of the corpus,
# S_t are the experts that token t is routed to, g the gate value that really multiplies the output f_j(x_t).
STATISTICS: dict[str, str] = {
    "frequency": "(E,) tokens routed to the expert: #{t : j in S_t}",
    "gate_sum": "(E,) sum of g_tj over routed tokens",
    "router_probability_sum": "(E,) sum over all tokens of the full softmax of the router logits",
    "top1_frequency": "(E,) tokens whose largest selected gate value is the expert's",
    "top1_confidence_sum": "(E,) sum of the softmax probability of the expert over the tokens of top1_frequency",
    "ean_sum": "(E,) sum over routed tokens of the L2 norm of f_j(x_t)",
    "weighted_ean_sum": "(E,) sum over routed tokens of g_tj * L2 norm of f_j(x_t)",
    "max_activation": "(E,) largest signed element of f_j(x_t) over routed tokens, never below 0",
    "output_mean": "(E, H) mean over ALL tokens of f_j(x_t), routed or not",
    "router_gram": "(E, E) sum over all tokens of r_ti * r_tj, raw router logits",
    "router_document_distance": "(E, E) mean over documents, weighted by tokens, of 1 - cosine of logit columns",
}


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one gated expert in the layout of ``nn.Linear``: gate and up (I, H), down (H, I)."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def _no_weights(layer: int, expert: int) -> ExpertWeights:
    raise WinnowError("these statistics were made without access to the expert weights")


@dataclass(frozen=True)
class Statistics:
    """Statistics of every MoE layer.

    ``layers`` maps the decoder layer's index to its arrays by name (float64, see ``STATISTICS``).
    ``expert_weights(layer, expert)`` reads the float32 weights of one expert when a method asks for them, so that no
    caller ever holds the whole model. ``num_experts`` is E, the same in every layer of an uncompressed model.
    """

    num_experts: int
    top_k: int
    tokens: int
    layers: Mapping[int, Mapping[str, np.ndarray]]
    n_group: int = 1
    expert_weights: Callable[[int, int], ExpertWeights] = field(default=_no_weights, repr=False)

    def get(self, layer: int, name: str) -> np.ndarray:
        """The array ``name`` of ``layer``. Raises WinnowError where the pass did not collect it."""
        try:
            return self.layers[layer][name]
        except KeyError:
            raise WinnowError(
                f"statistic '{name}' of layer {layer} was not collected; known statistics: {', '.join(STATISTICS)}"
            ) from None
