"""Every statistic by plain float64 loops over tokens and experts: slow, and too simple to be wrong.

Independent of the calibration pass: it hooks the routers of a transformers model, keeps what goes in and what
comes out, and adds up one token and one expert at a time.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from harness.statistics import ExpertWeights, Statistics


@dataclass(frozen=True)
class RoutedDocument:
    """What the router of one layer saw and said on one document of n tokens (no padding)."""

    hidden: np.ndarray  # (n, H) float64, input of the MoE block
    logits: np.ndarray  # (n, E) float64, raw router logits
    gates: np.ndarray  # (n, k) float64, the values that multiply the expert outputs
    indices: np.ndarray  # (n, k) int, the selected experts


def routed_documents(model: PreTrainedModel, documents: list[list[int]]) -> dict[int, list[RoutedDocument]]:
    """Layer -> one RoutedDocument a document; the documents go through the model alone, one by one."""
    seen: dict[int, list[RoutedDocument]] = {}

    def remember(layer: int):
        def hook(module, args, output):
            logits, gates, indices = output
            hidden = args[0].reshape(-1, args[0].shape[-1])
            seen.setdefault(layer, []).append(
                RoutedDocument(
                    hidden.double().numpy(), logits.double().numpy(), gates.double().numpy(), indices.numpy()
                )
            )

        return hook

    hooks = [
        layer.mlp.gate.register_forward_hook(remember(index))
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    try:
        with torch.no_grad():
            for document in documents:
                model(torch.tensor([document]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def weights_of(model: PreTrainedModel, layer: int, expert: int) -> ExpertWeights:
    """Float32 gate, up (I, H) and down (H, I) of one expert, out of the fused tensors in memory."""
    experts = model.model.layers[layer].mlp.experts
    fused = experts.gate_up_proj[expert].detach().float().numpy()
    width = fused.shape[0] // 2
    return ExpertWeights(fused[:width], fused[width:], experts.down_proj[expert].detach().float().numpy())


def expert_output(weights: ExpertWeights, x: np.ndarray) -> np.ndarray:
    """f(x) = W_down (silu(W_gate x) * (W_up x)) for one token x (H,), float64."""
    gate = weights.gate @ x
    up = weights.up @ x
    return weights.down @ (gate / (1.0 + np.exp(-gate)) * up)


def brute_force_statistics(model: PreTrainedModel, documents: list[list[int]]) -> Statistics:
    """Every statistic of ``harness.statistics.STATISTICS`` on ``documents`` (token ids as they are)."""
    assert model.config.hidden_act == "silu"
    routed = routed_documents(model, documents)
    layers = {layer: _layer_statistics(model, layer, seen) for layer, seen in routed.items()}
    first = next(iter(routed.values()))
    return Statistics(
        num_experts=first[0].logits.shape[1],
        top_k=first[0].indices.shape[1],
        tokens=sum(len(d) for d in documents),
        layers=layers,
        expert_weights=lambda layer, expert: weights_of(model, layer, expert),
    )


def _layer_statistics(model: PreTrainedModel, layer: int, seen: list[RoutedDocument]) -> dict[str, np.ndarray]:
    num_experts = seen[0].logits.shape[1]
    weights = []
    for j in range(num_experts):
        w = weights_of(model, layer, j)
        weights.append(ExpertWeights(w.gate.astype(float), w.up.astype(float), w.down.astype(float)))
    vector = lambda: np.zeros(num_experts)  # noqa: E731
    total = {
        "frequency": vector(),
        "gate_sum": vector(),
        "router_probability_sum": vector(),
        "top1_frequency": vector(),
        "top1_confidence_sum": vector(),
        "ean_sum": vector(),
        "weighted_ean_sum": vector(),
        "max_activation": vector(),
        "output_mean": np.zeros((num_experts, seen[0].hidden.shape[1])),
        "router_gram": np.zeros((num_experts, num_experts)),
        "router_document_distance": np.zeros((num_experts, num_experts)),
    }
    tokens = 0
    for document in seen:
        for t in range(len(document.hidden)):
            tokens += 1
            _add_token(total, weights, document, t)
    total["output_mean"] /= tokens
    for document in seen:
        share = len(document.logits) / tokens
        for i in range(num_experts):
            for j in range(num_experts):
                a, b = document.logits[:, i], document.logits[:, j]
                cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
                total["router_document_distance"][i, j] += share * (1.0 - cosine)
    return total


def _add_token(total: dict[str, np.ndarray], weights: list[ExpertWeights], document: RoutedDocument, t: int) -> None:
    x, logits = document.hidden[t], document.logits[t]
    chosen = {int(j): float(g) for j, g in zip(document.indices[t], document.gates[t], strict=True)}
    exponentials = [math.exp(r - max(logits)) for r in logits]
    probability = [e / sum(exponentials) for e in exponentials]
    best = max(chosen, key=lambda j: chosen[j])
    total["top1_frequency"][best] += 1
    total["top1_confidence_sum"][best] += probability[best]
    for j in range(len(weights)):
        output = expert_output(weights[j], x)
        total["output_mean"][j] += output
        total["router_probability_sum"][j] += probability[j]
        for i in range(len(weights)):
            total["router_gram"][i, j] += logits[i] * logits[j]
        if j in chosen:
            norm = math.sqrt(sum(v * v for v in output))
            total["frequency"][j] += 1
            total["gate_sum"][j] += chosen[j]
            total["ean_sum"][j] += norm
            total["weighted_ean_sum"][j] += chosen[j] * norm
            total["max_activation"][j] = max(total["max_activation"][j], max(output))
