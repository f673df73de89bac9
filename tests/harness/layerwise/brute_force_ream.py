"""REAM in plain float64 loops, the merged model built and run for every next layer; knows none of the code it tests."""

import copy
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PreTrainedModel

from tests.brute_force import moe_blocks, routed_documents


@dataclass(frozen=True)
class Layer:
    """What REAM does to one layer; ``weights`` are gate, up and down of every centroid, ``orders`` those of members."""

    saliency: np.ndarray
    distance: np.ndarray
    leader: list[int]
    orders: dict[int, list[int]]
    kept: list[int]
    weights: dict[int, list[np.ndarray]]


def matrices(model: PreTrainedModel, layer: int, expert: int) -> list[np.ndarray]:
    """Gate, up (I, H) and down (H, I) in float64, of models that store gate above up."""
    experts = moe_blocks(model)[layer].experts
    fused = experts.gate_up_proj[expert].detach().double().numpy()
    width = len(fused) // 2
    return [fused[:width], fused[width:], experts.down_proj[expert].detach().double().numpy()]


def hidden_of(parts: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    gate, up = parts[0] @ x, parts[1] @ x
    return gate / (1.0 + np.exp(-gate)) * up


def unit(v: np.ndarray) -> np.ndarray:
    length = math.sqrt(float(v @ v))
    return v / length if length else v


def ream(
    model: PreTrainedModel, documents: list[list[int]], count: int, size: int, sequential: bool = True
) -> dict[int, Layer]:
    """``model`` is in float64 and is changed: where ``sequential``, each layer once it is decided about."""
    found = {}
    intact = model if sequential else copy.deepcopy(model)
    for layer in sorted(moe_blocks(model)):
        found[layer] = _one(intact, layer, documents, count, size)
        _build(model, layer, found[layer])
    return found


def _one(model: PreTrainedModel, layer: int, documents: list[list[int]], count: int, size: int) -> Layer:
    seen = routed_documents(model, documents)[layer]
    experts = seen[0].logits.shape[1]
    parts = [matrices(model, layer, j) for j in range(experts)]
    total, times = np.zeros(experts), np.zeros(experts)
    logits, hidden = [], []
    for document in seen:
        for x, row, gates, indices in zip(
            document.hidden, document.logits, document.gates, document.indices, strict=True
        ):
            logits.append(row)
            hidden.append([hidden_of(part, x) for part in parts])
            for gate, j in zip(gates, indices, strict=True):
                output = parts[j][2] @ hidden[-1][j]
                total[j] += gate * math.sqrt(float(output @ output))
                times[j] += 1
    saliency = np.array([t / n if n else 0.0 for t, n in zip(total, times, strict=True)])
    distance = _distances(np.array(logits), hidden, parts)
    ranked = sorted(range(experts), key=lambda j: (-saliency[j], j))
    leader = {j: j for j in ranked[:count]}
    for centroid in ranked[:count]:
        group = 1
        while group < size and len(leader) < experts:
            nearest = min((j for j in range(experts) if j not in leader), key=lambda j: (distance[centroid, j], j))
            leader[nearest] = centroid
            group += 1
    orders, weights = {}, {}
    for centroid in ranked[:count]:
        members = [j for j in range(experts) if leader[j] == centroid]
        whole = sum(saliency[j] for j in members)
        merged = [np.zeros_like(part) for part in parts[0]]
        for j in members:
            order = list(range(len(parts[0][0])))
            if j != centroid:
                order = orders[j] = _align(hidden, parts, centroid, j)
            share = saliency[j] / whole
            merged[0] += share * parts[j][0][order]
            merged[1] += share * parts[j][1][order]
            merged[2] += share * parts[j][2][:, order]
        weights[centroid] = merged
    return Layer(saliency, distance, [leader[j] for j in range(experts)], orders, sorted(ranked[:count]), weights)


def _distances(logits: np.ndarray, hidden: list[list[np.ndarray]], parts: list[list[np.ndarray]]) -> np.ndarray:
    experts = len(parts)
    found = np.zeros((experts, experts))
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gated = [
        [p * (part[2] @ h) for p, part, h in zip(row, parts, token, strict=True)]
        for row, token in zip(probability, hidden, strict=True)
    ]
    for i, j in itertools.product(range(experts), repeat=2):
        gates = float(unit(logits[:, i]) @ unit(logits[:, j]))
        outputs = math.fsum(float(unit(token[i]) @ unit(token[j])) for token in gated) / len(gated)
        found[i, j] = 1 - ((gates + 1) / 2 + (outputs + 1) / 2) / 2
    return found


def _align(hidden: list[list[np.ndarray]], parts: list[list[np.ndarray]], centroid: int, member: int) -> list[int]:
    channels = [
        (np.array([token[j] for token in hidden]).T, np.concatenate([*parts[j][:2], parts[j][2].T], axis=1))
        for j in (centroid, member)
    ]
    width = len(channels[0][0])
    cost = np.zeros((width, width))
    for a, b in itertools.product(range(width), repeat=2):
        for one, other in zip(*channels, strict=True):
            difference = unit(one[a]) - unit(other[b])
            cost[a, b] += math.sqrt(float(difference @ difference))
    return linear_sum_assignment(cost)[1].tolist()


def _build(model: PreTrainedModel, layer: int, done: Layer) -> None:
    """The layer with fewer experts and rows, as a checkpoint of the merged model has them."""
    block = moe_blocks(model)[layer]
    gate_up = np.stack([np.concatenate(done.weights[j][:2]) for j in done.kept])
    down = np.stack([done.weights[j][2] for j in done.kept])
    block.experts.gate_up_proj = nn.Parameter(torch.from_numpy(gate_up))
    block.experts.down_proj = nn.Parameter(torch.from_numpy(down))
    block.experts.num_experts = block.router.num_experts = len(done.kept)
    block.router.weight = nn.Parameter(block.router.weight[done.kept])
