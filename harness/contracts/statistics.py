"""What one calibration pass measures, layer by layer: the only thing, beside a ratio, that a method sees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from harness.contracts.shape import MoeShape
from harness.errors import WinnowError

# What a statistic looks at; it decides which event of the calibration pass its collector is shown.
Sees = Literal["router", "routed pairs", "all tokens", "samples", "block output"]
# How the results of two passes over different tokens are combined (``harness.calibration.merge`` has the rules).
Merge = Literal["sum", "max", "token mean", "samples", "moving average"]


def sampled_tokens(num_experts: int) -> int:
    """How many tokens ``SAMPLED`` has at most: 2048, or what keeps E * E * T at 2^23 (64 MiB a layer in float64).

    2048 up to 64 experts, 512 with 128, 128 with 256.
    """
    return max(1, min(2048, 2**23 // num_experts**2))


@dataclass(frozen=True)
class Statistic:
    """The declaration of one statistic of an MoE layer; how it is collected and finished is its collector's business.

    ``shape`` has a number or a symbol for each axis: E experts, H hidden size, I channels, T sampled tokens, V ids of
    tokens. The elements are float64, but where there is one for every id: those are bool.
    """

    shape: tuple[str | int, ...]
    sees: Sees
    merges: Merge
    means: str

    def sizes(
        self, experts: int, hidden: int, width: int, tokens: int | None = None, vocabulary: int = 1
    ) -> tuple[int, ...]:
        """The shape in numbers; ``tokens`` are those of a sample, by default as many as it has at most."""
        sampled = sampled_tokens(experts) if tokens is None else tokens
        symbols = {"E": experts, "H": hidden, "I": width, "T": sampled, "V": vocabulary}
        return tuple(symbols[size] if isinstance(size, str) else size for size in self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 1 if "V" in self.shape else 8

    @property
    def expert_axes(self) -> int:
        """How many of the axes are experts; they are the first ones."""
        return self.shape.count("E")


# t runs over the T non-padding tokens of the corpus, S_t are the experts that token t is routed to, g the gate value
# that really multiplies the output f_j(x_t).
# For coverage: m_t is the sum of g_tj * f_j(x_t) over S_t, y_t the decoder layer's output, h_tj the activations before
# the down projection, d_jc the column c of that projection. The attributions of a layer add up to its relative block
# loss, the sum of |m_t|^2 / (|y_t|^2 + 1e-6). Of a perturbed block, in which every f_j is scaled by alpha, the loss is
# (1 - alpha)^2 times that, and its gradient along f_j -2 alpha (1 - alpha) times the attribution.
STATISTICS: dict[str, Statistic] = {
    "frequency": Statistic(("E",), "routed pairs", "sum", "tokens routed to the expert: #{t : j in S_t}"),
    "gate_sum": Statistic(("E",), "routed pairs", "sum", "sum of g_tj over routed tokens"),
    "router_score_sum": Statistic(
        ("E",), "router", "sum",
        "sum over all tokens of the router's score: the full softmax of the logits, or where the router has it their "
        "sigmoid (without the bias that experts are chosen with)",
    ),
    "top1_frequency": Statistic(
        ("E",), "router", "sum", "tokens whose largest selected gate value is the expert's"
    ),
    "top1_score_sum": Statistic(
        ("E",), "router", "sum", "sum of the router's score of the expert over the tokens of top1_frequency"
    ),
    "ean_sum": Statistic(("E",), "routed pairs", "sum", "sum over routed tokens of the L2 norm of f_j(x_t)"),
    "weighted_ean_sum": Statistic(
        ("E",), "routed pairs", "sum", "sum over routed tokens of g_tj * L2 norm of f_j(x_t)"
    ),
    "max_activation": Statistic(
        ("E",), "routed pairs", "max", "largest signed element of f_j(x_t) over routed tokens, never below 0"
    ),
    "output_square_sum": Statistic(("E", "H"), "routed pairs", "sum", "sum over routed tokens of f_j(x_t) squared"),
    "output_sum": Statistic(("E", "H"), "routed pairs", "sum", "sum over routed tokens of f_j(x_t)"),
    "gate_square_sum": Statistic(("E",), "routed pairs", "sum", "sum over routed tokens of g_tj squared"),
    "gate_square_output_sum": Statistic(
        ("E", "H"), "routed pairs", "sum", "sum over routed tokens of g_tj squared * f_j(x_t)"
    ),
    "difference_square_sum": Statistic(
        ("E", "H"), "routed pairs", "sum", "sum over routed tokens of x_t - f_j(x_t) squared"
    ),
    "input_sum": Statistic(("E", "H"), "routed pairs", "sum", "sum over routed tokens of x_t"),
    "channel_sum": Statistic(("E", "I"), "routed pairs", "sum", "sum over routed tokens of h_tj"),
    "input_gram": Statistic(("H", "H"), "all tokens", "sum", "sum over ALL tokens of x_t x_t^T"),
    "token_ids": Statistic(("E", "V"), "routed pairs", "max", "whether a token of this id is routed to the expert"),
    "output_mean": Statistic(("E", "H"), "all tokens", "token mean", "mean over ALL tokens of f_j(x_t), routed or not"),
    "router_gram": Statistic(("E", "E"), "router", "sum", "sum over all tokens of r_ti * r_tj, raw router logits"),
    "router_document_distance": Statistic(
        ("E", "E"), "router", "token mean", "mean over documents, weighted by tokens, of 1 - cosine of logit columns"
    ),
    "attribution_sum": Statistic(
        ("E",), "block output", "sum", "sum over routed tokens of g_tj * <m_t, f_j(x_t)> / (|y_t|^2 + 1e-6)"
    ),
    "channel_square_sum": Statistic(
        ("E", 3, "I"), "routed pairs", "sum", "sum over routed tokens of the squared gate output, up output and h_tj"
    ),
    "input_square_sum": Statistic(("E", "H"), "routed pairs", "sum", "sum over routed tokens of x_t squared"),
    "channel_saliency_sum": Statistic(
        ("E", "I"), "block output", "sum", "sum over routed tokens of |g_tj * h_tjc * <m_t, d_jc>| / (|y_t|^2 + 1e-6)"
    ),
    "released_attribution": Statistic(
        ("E",), "block output", "moving average",
        "EMA over documents of attribution_sum / T, terms clipped (released coverage code)",
    ),
    "released_activation": Statistic(
        ("E", "I"), "routed pairs", "moving average",
        "EMA over documents of the mean of the three roots of channel_square_sum (same code)",
    ),
    "sampled_inputs": Statistic(
        ("T", "H"), "samples", "samples",
        "what the router is given, of T tokens evenly spaced over the pass (see sampled_tokens)",
    ),
    "sampled_output_gram": Statistic(
        ("E", "E", "T"), "samples", "samples", "<f_i(x_t), f_j(x_t)> of the same tokens, routed or not"
    ),
}  # fmt: skip
# Read by coverage's variant=released alone: they depend on the order of the documents, and take a step for each.
RELEASED = frozenset(name for name, declared in STATISTICS.items() if declared.merges == "moving average")
# Read by NAEE alone: large, and every expert runs on every token of the sample.
SAMPLED = frozenset(name for name, declared in STATISTICS.items() if declared.sees == "samples")
# Read by ``vocabulary_coverage`` alone: large where the vocabulary is.
BY_ID = frozenset(name for name, declared in STATISTICS.items() if "V" in declared.shape)
# Read by what leaves novices alone (``methods.novices``): sums of vectors.
NOVICES = frozenset({
    "output_sum", "gate_square_sum", "gate_square_output_sum", "difference_square_sum", "input_sum", "channel_sum",
    "input_gram",
})  # fmt: skip
# What a router with sigmoids gives other numbers for than a softmax of its logits, which these once were.
ROUTER_SCORES = frozenset({"router_score_sum", "top1_score_sum"})
# (E, E, ...): experts against experts
SQUARE = frozenset(name for name, declared in STATISTICS.items() if declared.expert_axes == 2)


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one gated expert in the layout of ``nn.Linear``: gate and up (I, H), down (H, I)."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


# Layer, pairs (reference, member) of its experts -> of each pair the order of the member's channels that is closest to
# the reference, as ``harness.contracts.alignment.align_channels`` finds it.
Align = Callable[[int, Sequence[tuple[int, int]]], Sequence[tuple[int, ...]]]
# Of fixed tokens: the router rows that are left -> gate values (T, k) and, as places among these rows, experts (T, k).
Routing = Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]


class LayerLook(Protocol):
    """What a method that decides layer by layer may ask of one layer, while its weights and its inputs are there.

    T tokens that stand for all (``calibration.all_tokens`` of them, evenly spaced), each of which every expert is run
    on, routed or not. E experts, H hidden size, I channels; h_j(x) (I,) goes into the down projection of expert j, p_tj
    is the softmax of token t's router logits over all experts. Everything is float64.
    """

    @property
    def tokens(self) -> int:
        """T"""
        ...

    def output_cosine(self) -> np.ndarray:
        """(E, E): mean over tokens of the cosine of f_i(x_t) and f_j(x_t), 0 where one of them is 0."""
        ...

    def output_mean(self, gated: bool) -> np.ndarray:
        """(E, H): mean over tokens of f_j(x_t), or with ``gated`` of p_tj f_j(x_t)."""
        ...

    def channel_cosines(
        self, pairs: Sequence[tuple[int, int]], shuffled: int | None = None
    ) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each pair (c, e) of experts: cosines (I, I) between channels of h_c and of h_e over tokens, and which
        channels of h_c (I,) and of h_e (I,) are not 0 for every token.

        With the seed ``shuffled`` the tokens of each expert come in a random order of its own.
        """
        ...

    def document_saliency(self, power: int) -> np.ndarray:
        """(E,): mean over ALL documents of the mean of p_tj ** power * |f_j(x_t)| over the document's tokens with j
        among the k largest p_t; 0 for a document without any. Needs every token, not a sample."""
        ...

    def channel_features(self) -> np.ndarray:
        """(E, I, q): of each channel its gate row, up row and down column as one unit vector, centred over the layer
        and projected on q = 64 principal components, each times its singular value; unit vectors again.

        By ``torch.pca_lowrank`` on the CPU, seed 0, two iterations, so that its random start is that of REAM's release.
        """
        ...


def _no_look(layer: int) -> LayerLook:
    raise WinnowError("these statistics were made without a look at the layers")


def _no_weights(layer: int, expert: int) -> ExpertWeights:
    raise WinnowError("these statistics were made without access to the expert weights")


def _no_rows(layer: int) -> np.ndarray:
    raise WinnowError("these statistics were made without access to the routers' rows")


def _no_router(layer: int, inputs: np.ndarray) -> Routing:
    raise WinnowError("these statistics were made without access to the routers")


@dataclass(frozen=True)
class Statistics:
    """Statistics of every MoE layer.

    ``layers`` maps the decoder layer's index to its arrays by name (see ``STATISTICS``).
    ``expert_weights(layer, expert)`` reads the float32 weights of one expert when a method asks for them, so that no
    caller ever holds the whole model; ``router_rows(layer)`` are the float32 rows (E, H) of the router's matrix.
    ``router(layer, inputs)`` gives the ``Routing`` of what the router is given,
    (T, H), by the model's own rule. ``num_experts`` is E, the same in every layer of an uncompressed model;
    ``experts_left`` has the layers in which fewer are looked at (see ``restricted``). ``align``, where there is one,
    is a faster way to what follows from ``expert_weights``. ``look(layer)`` is for methods that decide layer by layer
    (``harness.contracts.layerwise``).
    """

    num_experts: int
    top_k: int
    tokens: int
    layers: Mapping[int, Mapping[str, np.ndarray]]
    n_group: int = 1
    expert_weights: Callable[[int, int], ExpertWeights] = field(default=_no_weights, repr=False)
    experts_left: Mapping[int, int] = field(default_factory=dict)
    router: Callable[[int, np.ndarray], Routing] = field(default=_no_router, repr=False)
    align: Align | None = field(default=None, repr=False)
    router_rows: Callable[[int], np.ndarray] = field(default=_no_rows, repr=False)
    look: Callable[[int], LayerLook] = field(default=_no_look, repr=False)

    @property
    def shape(self) -> MoeShape:
        return MoeShape(self.num_experts, self.top_k, self.n_group, layers=len(self.layers))

    def experts_in(self, layer: int) -> int:
        return self.experts_left.get(layer, self.num_experts)

    def get(self, layer: int, name: str) -> np.ndarray:
        """The array ``name`` of ``layer``. Raises WinnowError where the pass did not collect it."""
        try:
            return self.layers[layer][name]
        except KeyError:
            raise WinnowError(
                f"statistic '{name}' of layer {layer} was not collected; known statistics: {', '.join(STATISTICS)}"
            ) from None


def restricted(statistics: Statistics, kept: Mapping[int, Sequence[int]]) -> Statistics:
    """The same pass, looking only at the experts ``kept[layer]``, which are numbered 0, 1, ... in that order."""

    def rows(layer: int, name: str, values: np.ndarray) -> np.ndarray:
        axes = STATISTICS[name].expert_axes
        return values[np.ix_(*[list(kept[layer])] * axes)] if axes else values

    def align(layer: int, pairs: Sequence[tuple[int, int]]) -> Sequence[tuple[int, ...]]:
        assert statistics.align is not None
        return statistics.align(layer, [(kept[layer][one], kept[layer][other]) for one, other in pairs])

    def router(layer: int, inputs: np.ndarray) -> Routing:
        routing = statistics.router(layer, inputs)
        return lambda left: routing([kept[layer][expert] for expert in left])

    return replace(
        statistics,
        layers={
            layer: {name: rows(layer, name, values) for name, values in arrays.items()}
            for layer, arrays in statistics.layers.items()
        },
        expert_weights=lambda layer, expert: statistics.expert_weights(layer, kept[layer][expert]),
        experts_left={layer: len(experts) for layer, experts in kept.items()},
        router=router,
        align=None if statistics.align is None else align,
        router_rows=lambda layer: statistics.router_rows(layer)[list(kept[layer])],
    )
