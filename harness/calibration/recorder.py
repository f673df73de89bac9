"""What hangs on the MoE blocks while a model runs its own forward, and adds up the statistics of each layer.

A recorder sees a router's output and stands in for its experts' forward; it does not care who drives the
layers. The outputs of the experts are computed once, for routed tokens only, from the indices and gate values
that the block hands over, and not at all for padding. All sums are float64.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _grouped_linear

from harness.calibration.batches import BatchLayout
from harness.calibration.coverage_sums import NAMES as COVERAGE
from harness.calibration.coverage_sums import CoverageSums, RoutedPairs
from harness.calibration.sampled_tokens import SampledTokens
from harness.contracts.statistics import SAMPLED
from harness.errors import WinnowError
from harness.families.family import Family

# Tokens that one expert sees at once where every expert sees every token: bounds the memory of that pass.
_CHUNK = 4096
# The same where the outputs of all experts are held at once.
_SAMPLE_CHUNK = 16
_VECTORS = (
    "gate_sum",
    "router_probability_sum",
    "top1_frequency",
    "top1_confidence_sum",
    "ean_sum",
    "weighted_ean_sum",
    "max_activation",
)
_MATRICES = ("router_gram", "router_document_distance")


@dataclass
class LayerRecorder:
    """The running sums of one MoE layer with E experts over the batches seen so far.

    ``usage`` is (sources, E): routed tokens. ``sums`` holds what ``statistics`` asks for, by name;
    ``hidden_sum`` (E, I) is the sum over all tokens of every expert's activations before its down projection;
    ``pass_tokens`` are those of the whole pass, over which ``samples`` are spread.
    """

    layer: int
    experts: Any  # the block's experts module, of transformers' fused layout
    statistics: frozenset[str]
    num_sources: int
    pass_tokens: int = 0
    tokens: int = 0
    layout: BatchLayout | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    usage: Tensor = field(init=False)
    hidden_sum: Tensor | None = None
    coverage: CoverageSums | None = None
    samples: SampledTokens | None = None

    def __post_init__(self) -> None:
        self.num_experts = int(self.experts.num_experts)
        self.device: torch.device = self.experts.down_proj.device
        self.usage = torch.zeros(self.num_sources, self.num_experts, dtype=torch.int64, device=self.device)
        shapes = {name: (self.num_experts,) for name in _VECTORS} | {
            name: (self.num_experts, self.num_experts) for name in _MATRICES
        }
        for name in self.statistics & shapes.keys():
            self.sums[name] = torch.zeros(shapes[name], dtype=torch.float64, device=self.device)
        if self.statistics & COVERAGE:
            self.coverage = CoverageSums(self.experts, self.statistics & COVERAGE)
            self.sums |= self.coverage.sums  # the same tensors: they are added to in place
        if self.statistics & SAMPLED:
            self.samples = SampledTokens(self.experts, self.pass_tokens)
        # Not statistics: they turn NaN or infinite where anything that the layer computes does.
        self.sums["router logits"] = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sums["expert outputs"] = torch.zeros((), dtype=torch.float64, device=self.device)

    def start_batch(self, layout: BatchLayout) -> None:
        self.layout = BatchLayout(
            layout.real.to(self.device), layout.documents, layout.source.to(self.device), layout.tokens
        )
        self.tokens += layout.tokens
        if self.samples is not None:
            self.samples.start_batch(self.layout.real)

    # -- router ----------------------------------------------------------------------------------------------

    def add_inputs(self, hidden: Tensor) -> None:
        """``hidden`` (..., H): what the router is given."""
        if self.samples is not None and "sampled_inputs" in self.statistics:
            self.samples.add_inputs(hidden)

    def add_routing(self, logits: Tensor, gates: Tensor, indices: Tensor) -> None:
        """``logits`` (N, E) raw; ``gates`` and ``indices`` (N, k) of the selected experts."""
        layout = self._layout()
        if self.statistics & {"router_gram", "router_document_distance"}:
            self._add_grams(logits, layout)
        if layout.padded:
            logits, gates, indices = (logits[layout.real], gates[layout.real], indices[layout.real])
        self.sums["router logits"] += logits.sum(dtype=torch.float64)
        if not self.statistics & {"router_probability_sum", "top1_frequency", "top1_confidence_sum"}:
            return
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        self._add("router_probability_sum", probabilities.sum(0, dtype=torch.float64))
        best = indices.gather(1, gates.argmax(dim=1, keepdim=True))
        self._add("top1_frequency", torch.bincount(best.squeeze(1), minlength=self.num_experts))
        confidence = probabilities.gather(1, best).double()
        self._add("top1_confidence_sum", self._by_expert(best.squeeze(1), confidence.squeeze(1)))

    def _add_grams(self, logits: Tensor, layout: BatchLayout) -> None:
        if "router_document_distance" not in self.statistics:
            kept = (logits[layout.real] if layout.padded else logits).double()
            self._add("router_gram", kept.T @ kept)
            return
        # Per document, not per batch as in the REAP repository: so the statistic does not depend on the batch
        # size.
        for start, end in layout.documents:
            document = logits[start:end].double()
            gram = document.T @ document
            self._add("router_gram", gram)
            norms = gram.diagonal().sqrt()
            cosine = gram / torch.outer(norms, norms).clamp_min(1e-8)
            self._add("router_document_distance", (1.0 - cosine) * (end - start))

    # -- experts ---------------------------------------------------------------------------------------------

    def experts_forward(self, hidden: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
        """The experts' forward: ``hidden`` (N, H), ``indices`` and ``gates`` (N, k) -> (N, H), zero on
        padding.

        The same grouped products, in the same order, as ``grouped_mm_experts_forward`` of transformers.
        """
        layout, experts = self._layout(), self.experts
        positions, top_k = indices.shape
        if layout.padded:  # padding goes behind the last expert, and is cut off there
            indices = indices.masked_fill(~layout.real.unsqueeze(1), self.num_experts)
        expert, order = torch.sort(indices.reshape(-1))
        expert, order = expert[: layout.tokens * top_k], order[: layout.tokens * top_k]
        token = order // top_k
        ends = torch.bincount(expert, minlength=self.num_experts).cumsum(0, dtype=torch.int32)
        gate = gates.reshape(-1)[order]
        gate_up = _gate_up(experts, hidden[token], ends, expert)
        activations = experts._apply_gate(gate_up)
        pairs = RoutedPairs(expert, token, gate, order, ends, layout.documents)
        if self.coverage is not None:
            self.coverage.add_activations(pairs, hidden, gate_up, activations)
        del gate_up
        output = _down(experts, activations, ends, expert)
        self._add_outputs(expert, layout.source[token], gate, output)
        if "output_mean" in self.statistics:
            self._add_all_activations(hidden[layout.real] if layout.padded else hidden)
        if self.samples is not None and len(self.samples.positions) and "sampled_output_gram" in self.statistics:
            for chunk in hidden[self.samples.positions].split(_SAMPLE_CHUNK):
                self.samples.add_outputs(_outputs_of_all(experts, chunk))
        weighted = output.mul_(gate.unsqueeze(1)) if gate.dtype == output.dtype else output * gate.unsqueeze(1)
        unsorted = weighted.new_zeros(positions * top_k, weighted.shape[1])
        unsorted[order] = weighted
        result = unsorted.view(positions, top_k, -1).sum(1).to(hidden.dtype)
        if self.coverage is not None:
            slots = unsorted.view(positions, top_k, -1)
            self.coverage.add_outputs(pairs, activations, weighted, slots, result)
        self.sums["expert outputs"] += result.sum(dtype=torch.float32)
        return result

    def _add_outputs(self, expert: Tensor, source: Tensor, gate: Tensor, output: Tensor) -> None:
        """``expert``, ``source``, ``gate`` (S,) and ``output`` (S, H) of the S routed token-expert pairs."""
        cells = source * self.num_experts + expert
        self.usage += torch.bincount(cells, minlength=self.usage.numel()).view_as(self.usage)
        if "gate_sum" in self.statistics:
            self._add("gate_sum", self._by_expert(expert, gate.double()))
        if self.statistics & {"ean_sum", "weighted_ean_sum"}:
            precise = torch.promote_types(output.dtype, torch.float32)
            norm = torch.linalg.vector_norm(output, dim=1, dtype=precise).double()
            self._add("ean_sum", self._by_expert(expert, norm))
            self._add("weighted_ean_sum", self._by_expert(expert, norm * gate.double()))
        if "max_activation" in self.statistics:
            largest = output.amax(dim=1).double()
            self.sums["max_activation"].scatter_reduce_(0, expert, largest, reduce="amax", include_self=True)

    def _add_all_activations(self, hidden: Tensor) -> None:
        """Mean of f_j over all tokens, the cheap way: the down projection is linear, so it can wait for the
        mean.
        """
        for expert in range(self.num_experts):
            for chunk in hidden.split(_CHUNK):
                end = torch.tensor([len(chunk)], dtype=torch.int32, device=chunk.device)
                only = slice(expert, expert + 1)
                total = _activations(self.experts, chunk, end, slice(None), only).sum(0, dtype=torch.float64)
                if self.hidden_sum is None:
                    self.hidden_sum = total.new_zeros(self.num_experts, total.numel())
                self.hidden_sum[expert] += total

    def add_block_output(self, output: Tensor) -> None:
        """``output`` (B, L, H) of the decoder layer that the experts are in; the last call of a batch."""
        if self.coverage is not None:
            self.coverage.add_block_output(output.reshape(-1, output.shape[-1]))

    # -- results ---------------------------------------------------------------------------------------------

    def check_finite(self) -> None:
        """Raises WinnowError that names the layer and what is NaN or infinite in it."""
        named = self.sums if self.hidden_sum is None else self.sums | {"output_mean": self.hidden_sum}
        finite = torch.stack([torch.isfinite(value).all() for value in named.values()]).tolist()
        bad = [name for name, good in zip(named, finite, strict=True) if not good]
        if bad:
            # where the layer's own sums are broken, say so first: the statistics follow from them
            first = next((name for name in ("router logits", "expert outputs") if name in bad), bad[0])
            wrong = sorted(set(bad) - {"router logits", "expert outputs"})
            raise WinnowError(
                f"calibration: NaN or infinite {first} in layer {self.layer}"
                + (f" (statistics {', '.join(wrong)})" if wrong else "")
                + "; check the model's weights, or calibrate in float32 if they overflow in its dtype"
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics of the layer, float64, as ``harness.contracts.statistics.STATISTICS`` describes them."""
        result = {name: self.sums[name].cpu().numpy() for name in self.statistics & self.sums.keys()}
        if self.samples is not None:
            result |= self.samples.arrays()
        result["frequency"] = self.usage.sum(0).double().cpu().numpy()
        if "router_document_distance" in result:
            distance = result["router_document_distance"] / self.tokens
            np.fill_diagonal(distance, 0.0)
            result["router_document_distance"] = distance
        if self.hidden_sum is not None:
            mean = self.hidden_sum / self.tokens
            result["output_mean"] = (
                torch.stack([self._down_float64(j, mean[j]) for j in range(len(mean))]).cpu().numpy()
            )
        return result

    def _down_float64(self, expert: int, mean: Tensor) -> Tensor:
        experts = self.experts
        weight = experts.down_proj[expert].detach().double()
        output = mean @ weight if experts.is_transposed else weight @ mean
        return output + experts.down_proj_bias[expert].detach().double() if experts.has_bias else output

    def _by_expert(self, expert: Tensor, values: Tensor) -> Tensor:
        """(S,) values summed by expert, (E,) float64."""
        return torch.zeros(self.num_experts, dtype=torch.float64, device=values.device).index_add_(0, expert, values)

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.statistics:
            self.sums[name] += value

    def _layout(self) -> BatchLayout:
        if self.layout is None:
            raise RuntimeError("start_batch must come before the forward of a recorded layer")
        return self.layout


def _activations(experts: Any, x: Tensor, ends: Tensor, rows: Tensor | slice, which: slice = slice(None)) -> Tensor:
    """Activations before the down projection of the rows of ``x``, sorted by expert: group g ends at
    ``ends[g]``.

    ``which`` are the experts that take part; ``rows`` picks each row's bias among them.
    """
    return experts._apply_gate(_gate_up(experts, x, ends, rows, which))


def _gate_up(experts: Any, x: Tensor, ends: Tensor, rows: Tensor | slice, which: slice = slice(None)) -> Tensor:
    bias = experts.gate_up_proj_bias[which][rows] if experts.has_bias else None
    return _grouped_linear(x, experts.gate_up_proj[which], ends, bias, experts.is_transposed)


def _down(experts: Any, activations: Tensor, ends: Tensor, rows: Tensor) -> Tensor:
    bias = experts.down_proj_bias[rows] if experts.has_bias else None
    return _grouped_linear(activations, experts.down_proj, ends, bias, experts.is_transposed)


def _outputs_of_all(experts: Any, x: Tensor) -> Tensor:
    """(E, n, H): the output of every expert for every row of ``x`` (n, H), n > 0."""
    count = int(experts.num_experts)
    rows = torch.arange(count, device=x.device).repeat_interleave(len(x))
    ends = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * len(x)
    output = _down(experts, _activations(experts, x.repeat(count, 1), ends, rows), ends, rows)
    return output.view(count, len(x), -1)


@contextmanager
def recording(
    model: PreTrainedModel,
    family: Family,
    layers: list[int],
    statistics: frozenset[str],
    num_sources: int,
    tokens: int = 0,
) -> Iterator[list[LayerRecorder]]:
    """Recorders on the MoE blocks of ``layers``; the model is as it was when the context ends.

    Whoever drives the layers calls ``start_batch`` of each recorder before every batch, with ``tokens`` in all (which
    only the sampled statistics need to know).
    """
    with ExitStack() as stack:
        recorders = []
        for layer in layers:
            block = model.get_submodule(family.block.format(layer=layer))
            experts = block.get_submodule(family.experts)
            recorder = LayerRecorder(layer, experts, statistics, num_sources, tokens)
            recorders.append(recorder)
            router = block.get_submodule(family.router)
            stack.callback(router.register_forward_hook(partial(_route, recorder, family.router_output)).remove)
            decoder_layer = model.get_submodule(family.block.format(layer=layer).rpartition(".")[0])
            stack.callback(decoder_layer.register_forward_hook(partial(_end, recorder)).remove)
            stack.callback(_restore_forward, experts, vars(experts).get("forward"))
            experts.forward = recorder.experts_forward  # type: ignore[method-assign]
        yield recorders


def _restore_forward(experts: nn.Module, own: Any) -> None:
    """``own`` is the forward that the instance itself had (as accelerate's hooks give it one), or None."""
    vars(experts).pop("forward", None)
    if own is not None:
        experts.forward = own  # type: ignore[method-assign]


def _route(recorder: LayerRecorder, names: tuple[str, ...], module: nn.Module, args: Any, output: Any) -> None:
    named = dict(zip(names, output, strict=True))
    recorder.add_inputs(args[0])
    recorder.add_routing(named["logits"], named["gates"], named["indices"])


def _end(recorder: LayerRecorder, module: nn.Module, args: Any, output: Any) -> None:
    recorder.add_block_output(output[0] if isinstance(output, tuple) else output)
