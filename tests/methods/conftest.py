"""Cases that every method is tested on: made-up tokens, and real routing of a tiny model of each family.

A case holds the raw material token by token (for the brute force in the tests) beside the statistics (for
the method), so that the two are compared without sharing any arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from harness.contracts.statistics import ExpertWeights, Routing, Statistics
from tests.brute_force import brute_force_statistics, expert_output, routed_documents, weights_of
from tests.methods.made_up_look import made_up_look
from tests.tiny import FAMILY_NAMES, tiny_model

DOCUMENT_LENGTHS = (33, 11, 40)
ENDS = (33, 44)  # where documents end but the last


@dataclass(frozen=True)
class RawLayer:
    """One layer token by token: logits (T, E), gates and indices (T, k), outputs (T, E, H), ids (T,)."""

    logits: np.ndarray
    gates: np.ndarray
    indices: np.ndarray
    outputs: np.ndarray
    ids: np.ndarray
    vocabulary: int

    def routed(self, expert: int) -> list[tuple[int, float]]:
        """(token, gate value) of every token that was routed to ``expert``."""
        return [
            (t, float(self.gates[t, slot]))
            for t in range(len(self.indices))
            for slot in range(self.indices.shape[1])
            if self.indices[t, slot] == expert
        ]


@dataclass(frozen=True)
class Case:
    statistics: Statistics
    raw: Mapping[int, RawLayer]

    @property
    def num_experts(self) -> int:
        return self.statistics.num_experts


def made_up_case(seed: int, layers: tuple[int, ...] = (0, 2, 3), num_experts: int = 12, top_k: int = 3) -> Case:
    """Random logits, outputs and weights of width 5, and their statistics by array expressions.

    Every expert is some token's first choice, so that no saliency is 0.
    """
    rng = np.random.default_rng(seed)
    raw, statistics, weights, rows = {}, {}, {}, {}
    for layer in layers:
        shape = (sum(DOCUMENT_LENGTHS), num_experts)
        logits = rng.normal(size=shape) + 0.5 * rng.normal(size=num_experts)
        logits[range(num_experts), range(num_experts)] = logits.max() + 0.1
        probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        indices = np.argsort(-probability, axis=1)[:, :top_k]
        gates = np.take_along_axis(probability, indices, 1)
        outputs = rng.normal(size=(*shape, 6)) * rng.uniform(0.5, 3, size=num_experts)[:, None]
        # of their own, so that nothing else hangs on them
        ids = np.random.default_rng([seed, layer, 2]).integers(0, 50, size=len(logits))
        raw[layer] = RawLayer(logits, gates, indices, outputs, ids, 50)
        rows[layer] = np.random.default_rng([seed, layer, 3]).normal(size=(num_experts, 6)).astype(np.float32)
        statistics[layer] = _statistics_of(raw[layer], probability) | _made_up_coverage(raw[layer], seed + layer)
        statistics[layer] |= _made_up_inputs(statistics[layer], raw[layer], seed + layer)
        for j in range(num_experts):
            weights[layer, j] = ExpertWeights(*(rng.normal(size=s) for s in ((5, 6), (5, 6), (6, 5))))
    made = Statistics(
        num_experts,
        top_k,
        sum(DOCUMENT_LENGTHS),
        statistics,
        expert_weights=lambda layer, expert: weights[layer, expert],
        router=lambda layer, inputs: made_up_routing(inputs, top_k),
        router_rows=lambda layer: rows[layer],
        look=lambda layer: made_up_look(raw[layer], 5, ENDS, seed + layer),
    )
    return Case(made, raw)


def made_up_routing(logits: np.ndarray, top_k: int) -> Routing:
    """A router that is given its logits (T, E): softmax over the rows that are left, then top-k, not renormalised."""

    def routing(kept: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        probability = np.exp(logits[:, kept])
        probability /= probability.sum(1, keepdims=True)
        places = np.argsort(-probability, axis=1)[:, :top_k]
        return np.take_along_axis(probability, places, 1), places

    return routing


def _made_up_coverage(raw: RawLayer, seed: int, width: int = 5) -> dict[str, np.ndarray]:
    """What coverage reads, of channels that are made up on their own; some attributions are negative."""
    rng = np.random.default_rng([seed, 1])
    num_experts, hidden = raw.outputs.shape[1:]
    attribution = rng.gamma(1.5, size=num_experts)
    attribution[rng.integers(num_experts)] *= -0.1
    return {
        "attribution_sum": attribution,
        "channel_square_sum": rng.gamma(0.5, size=(num_experts, 3, width)),
        "input_square_sum": rng.gamma(2.0, size=(num_experts, hidden)),
        "channel_saliency_sum": rng.gamma(0.5, size=(num_experts, width)),
        "released_attribution": attribution * rng.uniform(0.8, 1.2, size=num_experts),
        "released_activation": rng.gamma(1.0, size=(num_experts, width)),
    }


def _statistics_of(raw: RawLayer, probability: np.ndarray) -> dict[str, np.ndarray]:
    gate = np.zeros_like(raw.logits)
    np.put_along_axis(gate, raw.indices, raw.gates, 1)
    routed = gate > 0
    first = gate == gate.max(1, keepdims=True)
    norm = np.linalg.norm(raw.outputs, axis=2)
    token_ids = np.zeros((raw.logits.shape[1], raw.vocabulary), dtype=bool)
    for token, expert in zip(*np.nonzero(routed), strict=True):
        token_ids[expert, raw.ids[token]] = True
    distance = np.zeros((raw.logits.shape[1],) * 2)
    for block in np.split(raw.logits, np.cumsum(DOCUMENT_LENGTHS)[:-1]):
        unit = block / np.linalg.norm(block, axis=0)
        distance += (1 - unit.T @ unit) * len(block) / len(raw.logits)
    return {
        "frequency": routed.sum(0).astype(float),
        "gate_sum": gate.sum(0),
        "router_score_sum": probability.sum(0),
        "top1_frequency": first.sum(0).astype(float),
        "top1_score_sum": (first * probability).sum(0),
        "ean_sum": (routed * norm).sum(0),
        "weighted_ean_sum": (gate * norm).sum(0),
        "max_activation": np.where(routed[:, :, None], raw.outputs, 0).max((0, 2)),
        "output_square_sum": (routed[:, :, None] * raw.outputs**2).sum(0),
        "output_sum": (routed[:, :, None] * raw.outputs).sum(0),
        "gate_square_sum": (gate**2).sum(0),
        "gate_square_output_sum": (gate[:, :, None] ** 2 * raw.outputs).sum(0),
        "token_ids": token_ids,
        "output_mean": raw.outputs.mean(0),
        "router_gram": raw.logits.T @ raw.logits,
        "router_document_distance": distance,
        "sampled_inputs": raw.logits,
        "sampled_output_gram": np.einsum("tih,tjh->ijt", raw.outputs, raw.outputs),
    }


def _made_up_inputs(found: Mapping[str, np.ndarray], raw: RawLayer, seed: int) -> dict[str, np.ndarray]:
    """Sums of what goes into the experts, and is inside, that no square sum in ``found`` is too small for."""
    rng = np.random.default_rng([seed, 4])
    count = found["frequency"][:, None]
    inputs = rng.normal(size=(len(raw.logits), raw.outputs.shape[2]))
    differences = [sum((inputs[t] - raw.outputs[t, j]) ** 2 for t, _ in raw.routed(j)) for j in range(len(count))]
    squares = {"input_sum": found["input_square_sum"], "channel_sum": found["channel_square_sum"][:, 2]}
    return {
        "difference_square_sum": np.array(differences),
        "input_gram": inputs.T @ inputs,
        **{name: np.sqrt(count * of) * rng.uniform(-0.9, 0.9, size=of.shape) for name, of in squares.items()},
    }


def model_case(family: str) -> Case:
    model = tiny_model(family)
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, 256, size=n).tolist() for n in DOCUMENT_LENGTHS]
    statistics = brute_force_statistics(model, documents)
    raw = {}
    for layer, seen in routed_documents(model, documents).items():
        experts = [weights_of(model, layer, j) for j in range(statistics.num_experts)]
        hidden = np.concatenate([document.hidden for document in seen])
        raw[layer] = RawLayer(
            np.concatenate([document.logits for document in seen]),
            np.concatenate([document.gates for document in seen]),
            np.concatenate([document.indices for document in seen]),
            np.array([[expert_output(w, x) for w in experts] for x in hidden]),
            np.concatenate([document.ids for document in seen]),
            model.config.vocab_size,
        )
    width = len(statistics.expert_weights(min(raw), 0).gate)
    look = {layer: made_up_look(seen, width, ENDS, layer) for layer, seen in raw.items()}
    return Case(replace(statistics, look=look.__getitem__), raw)


@pytest.fixture(scope="session", params=["made_up_1", "made_up_2", *FAMILY_NAMES])
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    return made_up_case(int(name[-1])) if name.startswith("made_up") else model_case(name)


def relabelled(statistics: Statistics, order: Mapping[int, np.ndarray]) -> Statistics:
    """The experts in another order: the new expert i of a layer is the old ``order[layer][i]``."""

    def reorder(layer: int, name: str, values: np.ndarray) -> np.ndarray:
        if name == "input_gram":  # of no expert
            return values
        values = values[order[layer]]
        square = name in ("router_gram", "router_document_distance")
        return values[:, order[layer]] if square else values

    return replace(
        statistics,
        layers={
            layer: {name: reorder(layer, name, values) for name, values in arrays.items()}
            for layer, arrays in statistics.layers.items()
        },
        expert_weights=lambda layer, expert: statistics.expert_weights(layer, int(order[layer][expert])),
        router_rows=lambda layer: statistics.router_rows(layer)[order[layer]],
    )


def with_statistic(statistics: Statistics, layer: int, name: str, values: object) -> Statistics:
    """A copy in which one array of one layer is replaced."""
    arrays = dict(statistics.layers[layer]) | {name: np.array(values, dtype=float)}
    return replace(statistics, layers=dict(statistics.layers) | {layer: arrays})


def partition(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(j for j, other in enumerate(labels) if other == label) for label in labels}
