"""What coverage reads, and sums of inputs and channels, by plain float64 loops over documents, tokens and experts."""

import re

import numpy as np
import torch
from transformers import PreTrainedModel

EPSILON = 1e-6


def coverage_statistics(model: PreTrainedModel, documents: list[list[int]]) -> dict[int, dict[str, np.ndarray]]:
    """Layer -> its statistics. The documents go through the model alone, the longest first, as a pass has them."""
    seen = _seen(model, sorted(documents, key=lambda document: -len(document)))
    return {layer: _layer(experts, passes) for layer, (experts, passes) in seen.items()}


def _seen(model: PreTrainedModel, documents: list[list[int]]):
    """Layer -> its experts, and of each document what goes into them and what comes out of the decoder layer."""
    found = {}
    hooks = []
    for name, experts in list(model.named_modules()):
        if type(experts).__name__.endswith("Experts"):
            path, layer = re.search(r"(.*layers\.(\d+))\.", name).groups()
            passes = found.setdefault(int(layer), (experts, []))[1]
            remember = lambda module, args, passes=passes: passes.append([a.detach() for a in args])  # noqa: E731
            hooks.append(experts.register_forward_pre_hook(remember))

            def end(module, args, output, passes=passes):
                passes[-1].append((output[0] if isinstance(output, tuple) else output).detach())

            hooks.append(model.get_submodule(path).register_forward_hook(end))
    with torch.no_grad():
        for document in documents:
            model(torch.tensor([document]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _layer(experts, passes) -> dict[str, np.ndarray]:
    weights = [_weights(experts, j) for j in range(experts.num_experts)]
    hidden, width = weights[0][4].shape
    count = len(weights)
    total = {
        "attribution_sum": np.zeros(count),
        "channel_square_sum": np.zeros((count, 3, width)),
        "input_square_sum": np.zeros((count, hidden)),
        "input_sum": np.zeros((count, hidden)),
        "channel_sum": np.zeros((count, width)),
        "channel_saliency_sum": np.zeros((count, width)),
        "released_attribution": np.zeros(count),
        "released_activation": np.zeros((count, width)),
    }
    begun = set()
    for xs, indices, gates, block_output in passes:
        tokens = len(indices)
        xs, gates = xs.double().numpy().reshape(tokens, -1), gates.double().numpy()
        ys = block_output.double().numpy().reshape(tokens, -1)
        products = {j: [] for j in range(count)}
        squares = {j: np.zeros((3, width)) for j in range(count)}
        for x, chosen, shares, y in zip(xs, indices.tolist(), gates, ys, strict=True):
            ran = [_run(experts, weights[j], x) for j in chosen]
            combined = sum(g * output for g, (_, _, _, output) in zip(shares, ran, strict=True))
            scale = float(y @ y) + EPSILON
            for j, g, (gate, up, inner, output) in zip(chosen, shares, ran, strict=True):
                total["attribution_sum"][j] += g * float(combined @ output) / scale
                total["input_square_sum"][j] += x**2
                total["input_sum"][j] += x
                total["channel_sum"][j] += inner
                squares[j] += np.stack([gate**2, up**2, inner**2])
                total["channel_saliency_sum"][j] += np.abs(g * inner * (weights[j][4].T @ combined)) / scale
                products[j].append(g * output * combined / scale)
        for j in range(count):
            total["channel_square_sum"][j] += squares[j]
            if not products[j]:
                continue
            terms = np.array(products[j])
            if len(terms) > 2:
                limit = np.quantile(np.abs(terms), 0.99, axis=0)
                terms = np.clip(terms, -limit, limit)
            usage = len(terms) / tokens
            fresh = {
                "released_attribution": terms.mean(axis=0).sum() * usage,
                "released_activation": np.sqrt(squares[j]).sum(axis=0) / 3,
            }
            for name, value in fresh.items():
                total[name][j] = 0.9 * total[name][j] + 0.1 * value if j in begun else value
            begun.add(j)
    return total


def _weights(experts, j: int):
    """gate, up, their biases, down and its bias."""
    fused, down = experts.gate_up_proj[j].detach().double(), experts.down_proj[j].detach().double()
    if experts.is_transposed:
        fused, down = fused.T, down.T
    fused, down = fused.numpy(), down.numpy()
    bias, down_bias = np.zeros(len(fused)), np.zeros(len(down))
    if experts.has_bias:
        bias = experts.gate_up_proj_bias[j].detach().double().numpy()
        down_bias = experts.down_proj_bias[j].detach().double().numpy()
    half = len(fused) // 2
    first, second = (
        (slice(half), slice(half, None)) if experts.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    )
    return fused[first], fused[second], bias[first], bias[second], down, down_bias


def _run(experts, weights, x: np.ndarray):
    """gate output, up output, channel activations and output of one expert on one token."""
    w_gate, w_up, b_gate, b_up, down, b_down = weights
    gate, up = w_gate @ x + b_gate, w_up @ x + b_up
    if hasattr(experts, "limit"):  # gpt-oss
        clamped = np.minimum(gate, experts.limit)
        inner = clamped / (1 + np.exp(-experts.alpha * clamped)) * (np.clip(up, -experts.limit, experts.limit) + 1)
    else:
        inner = gate / (1 + np.exp(-gate)) * up
    return gate, up, inner, down @ inner + b_down
