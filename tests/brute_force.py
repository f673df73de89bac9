"""Every statistic by plain float64 loops over tokens and experts: slow, and too simple to be wrong.

Independent of the calibration pass and of the family table: it finds the routers of a transformers model by the names
of their classes, keeps what goes in and what comes out, and adds up one token and one expert at a time.
"""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from harness.contracts.statistics import ExpertWeights, Routing, Statistics
from tests.brute_force_coverage import coverage_statistics

# Architectures whose routers take the sigmoid of a logit (their papers, and their code in transformers).
SIGMOID = ("deepseek_v3", "kimi_k2", "glm4_moe", "dots1", "minimax_m2", "lfm2_moe")


@dataclass(frozen=True)
class RoutedDocument:
    """What the router of one layer saw and said on one document of n tokens (no padding)."""

    hidden: np.ndarray  # (n, H) float64, input of the MoE block
    logits: np.ndarray  # (n, E) float64, raw router logits
    gates: np.ndarray  # (n, k) float64, the values that multiply the expert outputs
    indices: np.ndarray  # (n, k) int, the selected experts
    ids: np.ndarray  # (n,) int, the document itself


@dataclass(frozen=True)
class Block:
    """An MoE block of a transformers model."""

    router: nn.Module
    experts: nn.Module


def moe_blocks(model: PreTrainedModel) -> dict[int, Block]:
    """Layer -> its MoE block: the parent of what calls itself experts, with a router under one of two names."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            router = parent.gate if hasattr(parent, "gate") else parent.router
            found[int(re.search(r"layers\.(\d+)\.", name)[1])] = Block(router, module)
    return found


def router_answer(output: tuple[torch.Tensor, ...], num_experts: int) -> dict[str, torch.Tensor]:
    """Logits, gates and indices, told apart by what they look like (fewer experts are selected than there are)."""
    names = {}
    for tensor in output:
        if not tensor.is_floating_point():
            names["indices"] = tensor
        else:
            names["logits" if tensor.shape[-1] == num_experts else "gates"] = tensor
    return names


def routed_documents(model: PreTrainedModel, documents: list[list[int]]) -> dict[int, list[RoutedDocument]]:
    """Layer -> one RoutedDocument a document; the documents go through the model alone, one by one."""
    seen: dict[int, list[RoutedDocument]] = {}

    def remember(layer: int, num_experts: int):
        def hook(module, args, output):
            named = router_answer(output, num_experts)
            hidden = args[0].reshape(-1, args[0].shape[-1])
            seen.setdefault(layer, []).append(
                RoutedDocument(
                    hidden.double().numpy(),
                    named["logits"].double().numpy(),
                    named["gates"].double().numpy(),
                    named["indices"].numpy(),
                    np.array(document),
                )
            )

        return hook

    hooks = [
        block.router.register_forward_hook(remember(layer, block.experts.num_experts))
        for layer, block in moe_blocks(model).items()
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
    experts = moe_blocks(model)[layer].experts
    fused = experts.gate_up_proj[expert].detach().float().numpy()
    down = experts.down_proj[expert].detach().float().numpy()
    if experts.is_transposed:
        fused, down = fused.T, down.T
    width = fused.shape[0] // 2
    if experts.is_concatenated:
        return ExpertWeights(fused[:width], fused[width:], down)
    return ExpertWeights(fused[::2], fused[1::2], down)


def expert_function(model: PreTrainedModel, layer: int, expert: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function f of one expert, in float64: ``expert_output``, or that of gpt-oss with biases and clamps."""
    weights = weights_of(model, layer, expert)
    weights = ExpertWeights(weights.gate.astype(float), weights.up.astype(float), weights.down.astype(float))
    experts = moe_blocks(model)[layer].experts
    if not experts.has_bias:
        return lambda x: expert_output(weights, x)
    bias = experts.gate_up_proj_bias[expert].detach().double().numpy()
    down_bias = experts.down_proj_bias[expert].detach().double().numpy()

    def clamped(x: np.ndarray) -> np.ndarray:
        gate = np.minimum(weights.gate @ x + bias[::2], experts.limit)
        up = np.clip(weights.up @ x + bias[1::2], -experts.limit, experts.limit)
        return weights.down @ (gate / (1.0 + np.exp(-experts.alpha * gate)) * (up + 1.0)) + down_bias

    return clamped


def expert_output(weights: ExpertWeights, x: np.ndarray) -> np.ndarray:
    """f(x) = W_down (silu(W_gate x) * (W_up x)) for one token x (H,), float64."""
    gate = weights.gate @ x
    up = weights.up @ x
    return weights.down @ (gate / (1.0 + np.exp(-gate)) * up)


def brute_force_statistics(model: PreTrainedModel, documents: list[list[int]]) -> Statistics:
    """Every statistic of ``harness.contracts.statistics.STATISTICS`` on ``documents`` (token ids as they are)."""
    assert getattr(model.config, "hidden_act", "silu") == "silu"
    routed = routed_documents(model, documents)
    coverage = coverage_statistics(model, documents)
    layers = {layer: _layer_statistics(model, layer, seen) | coverage[layer] for layer, seen in routed.items()}
    first = next(iter(routed.values()))
    return Statistics(
        num_experts=first[0].logits.shape[1],
        top_k=first[0].indices.shape[1],
        tokens=sum(len(d) for d in documents),
        layers=layers,
        expert_weights=lambda layer, expert: weights_of(model, layer, expert),
        router=lambda layer, inputs: pruned_routing(model, layer, inputs),
        router_rows=lambda layer: moe_blocks(model)[layer].router.weight.detach().float().numpy(),
    )


def pruned_routing(model: PreTrainedModel, layer: int, inputs: np.ndarray) -> Routing:
    """What the router of one layer answers with some of its rows cut out of a copy of it.

    The families of ``tests.tiny.FAMILY_NAMES``, whose routers are a matrix of rows and nothing else.
    """

    def routing(kept: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        router = copy.deepcopy(moe_blocks(model)[layer].router)
        router.weight = nn.Parameter(router.weight[list(kept)])
        with torch.no_grad():
            named = router_answer(router(torch.from_numpy(inputs).float()), len(kept))
        return named["gates"].double().numpy(), named["indices"].numpy()

    return routing


def _layer_statistics(model: PreTrainedModel, layer: int, seen: list[RoutedDocument]) -> dict[str, np.ndarray]:
    num_experts = seen[0].logits.shape[1]
    functions = [expert_function(model, layer, j) for j in range(num_experts)]
    vector = lambda: np.zeros(num_experts)  # noqa: E731
    total = {
        "frequency": vector(),
        "gate_sum": vector(),
        "router_score_sum": vector(),
        "top1_frequency": vector(),
        "top1_score_sum": vector(),
        "ean_sum": vector(),
        "weighted_ean_sum": vector(),
        "max_activation": vector(),
        "output_mean": np.zeros((num_experts, seen[0].hidden.shape[1])),
        "output_square_sum": np.zeros((num_experts, seen[0].hidden.shape[1])),
        "output_sum": np.zeros((num_experts, seen[0].hidden.shape[1])),
        "gate_square_sum": vector(),
        "gate_square_output_sum": np.zeros((num_experts, seen[0].hidden.shape[1])),
        "difference_square_sum": np.zeros((num_experts, seen[0].hidden.shape[1])),
        "input_gram": np.zeros((seen[0].hidden.shape[1],) * 2),
        "token_ids": np.zeros((num_experts, model.config.vocab_size), dtype=bool),
        "router_gram": np.zeros((num_experts, num_experts)),
        "router_document_distance": np.zeros((num_experts, num_experts)),
    }
    tokens = 0
    for document in seen:
        for t in range(len(document.hidden)):
            tokens += 1
            _add_token(total, functions, document, t, model.config.model_type in SIGMOID)
    total["output_mean"] /= tokens
    total |= _sampled(functions, seen)
    for document in seen:
        share = len(document.logits) / tokens
        for i in range(num_experts):
            for j in range(num_experts):
                a, b = document.logits[:, i], document.logits[:, j]
                cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
                total["router_document_distance"][i, j] += share * (1.0 - cosine)
    return total


def _sampled(functions: list[Callable[[np.ndarray], np.ndarray]], seen: list[RoutedDocument]) -> dict[str, np.ndarray]:
    """Of every token: these tests have fewer than a sample has at most. The pass sees the longest documents first."""
    hidden = np.concatenate([document.hidden for document in sorted(seen, key=lambda document: -len(document.hidden))])
    assert len(hidden) <= 2048
    outputs = np.array([[f(x) for x in hidden] for f in functions])
    gram = [[[float(a @ b) for a, b in zip(one, other, strict=True)] for other in outputs] for one in outputs]
    return {"sampled_inputs": hidden, "sampled_output_gram": np.array(gram)}


def _add_token(
    total: dict[str, np.ndarray],
    functions: list[Callable[[np.ndarray], np.ndarray]],
    document: RoutedDocument,
    t: int,
    sigmoid: bool,
) -> None:
    x, logits = document.hidden[t], document.logits[t]
    chosen = {int(j): float(g) for j, g in zip(document.indices[t], document.gates[t], strict=True)}
    exponentials = [math.exp(r - max(logits)) for r in logits]
    score = [
        1 / (1 + math.exp(-r)) if sigmoid else e / sum(exponentials) for r, e in zip(logits, exponentials, strict=True)
    ]
    best = max(chosen, key=lambda j: chosen[j])
    total["top1_frequency"][best] += 1
    total["top1_score_sum"][best] += score[best]
    total["input_gram"] += np.outer(x, x)
    for j in range(len(functions)):
        output = functions[j](x)
        total["output_mean"][j] += output
        total["router_score_sum"][j] += score[j]
        for i in range(len(functions)):
            total["router_gram"][i, j] += logits[i] * logits[j]
        if j in chosen:
            norm = math.sqrt(sum(v * v for v in output))
            total["frequency"][j] += 1
            total["token_ids"][j, document.ids[t]] = True
            total["output_sum"][j] += output
            total["output_square_sum"][j] += output**2
            total["gate_square_sum"][j] += chosen[j] ** 2
            total["gate_square_output_sum"][j] += chosen[j] ** 2 * output
            total["difference_square_sum"][j] += (x - output) ** 2
            total["gate_sum"][j] += chosen[j]
            total["ean_sum"][j] += norm
            total["weighted_ean_sum"][j] += chosen[j] * norm
            total["max_activation"][j] = max(total["max_activation"][j], max(output))
