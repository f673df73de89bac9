"""Refits by direct least squares in numpy, from the modules of models in float64; knows none of the code it tests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert
from harness.families.moe_block import MoeBlock, moe_block
from harness.families.table import FAMILIES


def sequences(count: int = 12, seed: int = 0, source: str = "text") -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 60, count)
    return [TokenSequence(rng.integers(0, 256, size), (int(size),), (source,)) for size in lengths]


@dataclass
class Seen:
    """Of one layer: ``x`` (T, H) goes into the experts, ``gates`` (T, E) are dense, ``output`` (T, H) comes out."""

    x: np.ndarray
    gates: np.ndarray
    output: np.ndarray


def intact(folder: Path) -> torch.nn.Module:
    return load_model(folder, "float64")


def seen(model: torch.nn.Module, family: str, layer: int, text: list[TokenSequence]) -> Seen:
    """One sequence after the other through the whole model."""
    block = moe_block(model, FAMILIES[family], layer)
    parts: list[tuple[np.ndarray, ...]] = []
    handle = block.experts.register_forward_hook(lambda _, args, out: parts.append(_dense(block, *args, out)))
    with torch.no_grad():
        for sequence in text:
            model(torch.from_numpy(sequence.input_ids).unsqueeze(0))
    handle.remove()
    return Seen(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _dense(block: MoeBlock, x: torch.Tensor, indices: torch.Tensor, gates: torch.Tensor, out: torch.Tensor):
    dense = torch.zeros(len(x), block.experts.num_experts, dtype=torch.float64)
    dense.scatter_add_(1, indices, gates.double())
    return x.numpy().copy(), dense.numpy(), out.detach().numpy().copy()


def outputs(block: MoeBlock, x: np.ndarray) -> np.ndarray:
    """(E, T, H): every expert of the block on every token."""
    rows, one = torch.from_numpy(x), torch.ones(len(x), 1, dtype=torch.float64)
    with torch.no_grad():
        return np.stack(
            [block.experts(rows, torch.full((len(x), 1), j), one).numpy() for j in range(block.experts.num_experts)]
        )


@dataclass
class New:
    """A new expert in numpy: ``hidden`` (T, d), ``down`` (H, d), and ``rest`` (T, H), what it gives besides."""

    hidden: np.ndarray
    down: np.ndarray
    rest: np.ndarray


def new_expert(block: MoeBlock, expert: NewExpert, x: np.ndarray) -> New:
    rest = np.zeros_like(x)
    if expert.constant is not None:
        rest = rest + expert.constant.values
    if expert.low_rank is not None:
        low = expert.low_rank
        rest = rest + x @ low.right.values.T @ low.left.values.T + (0 if low.shift is None else low.shift.values)
    if not expert.sources:
        return New(np.zeros((len(x), 0)), np.zeros((x.shape[1], 0)), rest)
    module = block.experts
    gate_up, down = module.gate_up_proj.detach().numpy(), module.down_proj.detach().numpy()
    if module.is_transposed:
        gate_up, down = gate_up.transpose(0, 2, 1), down.transpose(0, 2, 1)
    width = down.shape[2]
    gates, ups = (
        (gate_up[:, :width], gate_up[:, width:]) if module.is_concatenated else (gate_up[:, ::2], gate_up[:, 1::2])
    )
    biased = module.has_bias
    bias = module.gate_up_proj_bias.detach().numpy() if biased else np.zeros(gate_up.shape[:2])
    gate_bias, up_bias = _apart(module, bias, width)
    down_bias = module.down_proj_bias.detach().numpy() if biased else np.zeros(down.shape[:2])
    channels = list(range(width) if expert.channels is None else expert.channels)

    def total(stack: np.ndarray, axis: int | None) -> np.ndarray:
        found = 0.0
        for source in expert.sources:
            order = channels if source.permutation is None else [source.permutation[c] for c in channels]
            part = stack[source.expert]
            found = found + source.weight * (part if axis is None else np.take(part, order, axis))
        return np.asarray(found)

    gate = x @ total(gates, 0).T + total(gate_bias, 0)
    up = x @ total(ups, 0).T + total(up_bias, 0)
    if biased:  # gpt-oss: clamped, and a gate of its own
        gate, up = np.minimum(gate, module.limit), np.clip(up, -module.limit, module.limit)
        hidden = (up + 1) * gate / (1 + np.exp(-module.alpha * gate))
    else:
        hidden = gate / (1 + np.exp(-gate)) * up
    fitted = None if expert.down is None else expert.down.values.astype(np.float64)
    return New(hidden, total(down, 1) if fitted is None else fitted, rest + total(down_bias, None))


def _apart(module: torch.nn.Module, stack: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    if module.is_concatenated:
        return stack[:, :width], stack[:, width:]
    return stack[:, ::2], stack[:, 1::2]


def least_squares(design: np.ndarray, wanted: np.ndarray, prior: np.ndarray, alpha: float) -> np.ndarray:
    """The V (H, d) of min |design V^T - wanted|^2 + lambda |V - prior|^2, by one regression with more rows."""
    width = design.shape[1]
    damping = np.sqrt(alpha * np.square(design).sum() / width) * np.eye(width)
    return np.linalg.lstsq(np.vstack([design, damping]), np.vstack([wanted, damping @ prior.T]), rcond=None)[0].T


def members(plan: LayerPlan, place: int) -> list[int]:
    rows = {row for row, new in enumerate(plan.route) if new == place}
    return sorted(rows | {source.expert for source in plan.experts[place].sources})


def routed(plan: LayerPlan, place: int, block: MoeBlock, found: Seen, alpha: float) -> np.ndarray:
    group = members(plan, place)
    gamma = found.gates[:, group].sum(1)
    some = (found.gates[:, group] > 0).any(1)
    new = new_expert(block, plan.experts[place], found.x[some])
    wanted = np.einsum("tj,jth->th", found.gates[some][:, group], outputs(block, found.x[some])[group])
    gamma = gamma[some][:, None]
    return least_squares(gamma * new.hidden, wanted - gamma * new.rest, new.down, alpha)


def all_tokens(plan: LayerPlan, place: int, block: MoeBlock, x: np.ndarray, alpha: float) -> np.ndarray:
    expert = plan.experts[place]
    new, every = new_expert(block, expert, x), outputs(block, x)
    wanted = sum(source.weight * every[source.expert] for source in expert.sources)
    return least_squares(new.hidden, wanted - new.rest, new.down, alpha)


def left_gates(
    folder: Path, plan: CompressionPlan, family: str, layer: int, x: np.ndarray, scratch: Path
) -> np.ndarray:
    """(T, new experts): the gate values of the checkpoint that the plan leaves, for the same tokens.

    The plan keeps rows and new experts in the same order where it prunes.
    """
    apply_plan(folder, plan, scratch)
    block = moe_block(load_model(scratch, "float64"), FAMILIES[family], layer)
    answers: list[dict[str, torch.Tensor]] = []
    names = FAMILIES[family].router_output
    handle = block.router.register_forward_hook(lambda _, args, out: answers.append(dict(zip(names, out, strict=True))))
    with torch.no_grad():
        block.block(torch.from_numpy(x).unsqueeze(0))
    handle.remove()
    (of_layer,) = (each for each in plan.layers if each.layer == layer)
    led = torch.tensor([new for new in of_layer.route if new is not None])
    dense = torch.zeros(len(x), len(of_layer.experts), dtype=torch.float64)
    dense.scatter_add_(1, led[answers[0]["indices"]], answers[0]["gates"].double())
    return dense.numpy()


def joint(
    plan: LayerPlan, block: MoeBlock, found: Seen, gates: np.ndarray, alpha: float, shares: dict[int, int]
) -> dict[int, np.ndarray]:
    """All at once, each expert with a ridge of its own. Expert i of ``shares`` has the down projection of shares[i]."""
    made = [new_expert(block, expert, found.x) for expert in plan.experts]
    free = [place for place, expert in enumerate(plan.experts) if expert.sources and place not in shares]
    gamma = {place: gates[:, place] + sum(gates[:, i] for i, of in shares.items() if of == place) for place in free}
    designs = [gamma[place][:, None] * made[place].hidden for place in free]
    widths = [design.shape[1] for design in designs]
    damping = np.concatenate(
        [np.full(d, np.sqrt(alpha * np.square(z).sum() / d)) for z, d in zip(designs, widths, strict=True)]
    )
    prior = np.hstack([made[place].down for place in free])
    wanted = found.output - sum(gates[:, [place]] * new.rest for place, new in enumerate(made))
    stacked = np.vstack([np.hstack(designs), np.diag(damping)])
    solved = np.linalg.lstsq(stacked, np.vstack([wanted, damping[:, None] * prior.T]), rcond=None)[0].T
    fitted = dict(zip(free, np.split(solved, np.cumsum(widths)[:-1], axis=1), strict=True))
    return fitted | {place: fitted[of] for place, of in shares.items()}


def error(plan: LayerPlan, block: MoeBlock, found: Seen, gates: np.ndarray, downs: dict[int, np.ndarray]) -> float:
    """sum_t |m_t - m'_t|^2 / sum_t |m_t|^2 with these down projections."""
    total = np.zeros_like(found.output)
    for place, expert in enumerate(plan.experts):
        new = new_expert(block, expert, found.x)
        total += gates[:, [place]] * (new.hidden @ downs.get(place, new.down).T + new.rest)
    return float(np.square(found.output - total).sum() / np.square(found.output).sum())
