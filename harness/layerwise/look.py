"""What a method may ask of one layer while its weights and its inputs are there (``LayerLook``), in torch.

Every expert runs on every token, a few tokens at a time: no array has more than ``ELEMENTS`` elements for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from harness.calibration.batches import evenly_spaced
from harness.calibration.fused_experts import FusedExperts
from harness.errors import WinnowError

ELEMENTS = 2**25  # of one array that grows with tokens: 128 MiB in float32
_COMPONENTS, _ITERATIONS = 64, 2  # of the principal components, as REAM's release has them


@dataclass(frozen=True)
class Inputs:
    """Of the tokens that are kept, in the order of the pass, on the host: ``hidden`` (T, H) goes into the experts,
    ``logits`` (T, E) are the router's, ``document`` (T,) counts the documents."""

    hidden: Tensor
    logits: Tensor
    document: Tensor


@dataclass(frozen=True)
class Look:
    """``LayerLook``: ``limit`` of the ``inputs``, evenly spaced, stand for all (None: all do)."""

    experts: FusedExperts
    inputs: Inputs
    top_k: int
    limit: int | None = None
    elements: int = ELEMENTS

    @property
    def places(self) -> Tensor:
        """(T,): which of the inputs stand for all."""
        return evenly_spaced(len(self.inputs.hidden), self.limit)

    @property
    def tokens(self) -> int:
        return len(self.places)

    def output_cosine(self) -> np.ndarray:
        count = self.experts.num_experts
        total = self._zeros(count, count)
        for _, outputs in self._outputs():
            exact = outputs.double()
            norms = exact.norm(dim=2, keepdim=True)
            units = torch.where(norms == 0, 0.0, exact / norms).reshape(count, -1)
            total += units @ units.T
        return (total / self.tokens).cpu().numpy()

    def output_mean(self, gated: bool) -> np.ndarray:
        total = self._zeros(self.experts.num_experts, self.experts.hidden)
        for places, outputs in self._outputs():
            weights = self._probabilities(places) if gated else self._zeros(len(places), len(total)) + 1.0
            total += torch.einsum("te,eth->eh", weights, outputs.double())
        return (total / self.tokens).cpu().numpy()

    def channel_cosines(
        self, pairs: Sequence[tuple[int, int]], shuffled: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for one, together in groupby(sorted(pairs), key=lambda pair: pair[0]):
            members = [member for _, member in together]
            inner, squares = self._inner(one, members, shuffled)
            norms = squares.sqrt()
            for place, member in enumerate(members):
                scale = torch.outer(norms[0], norms[place + 1])
                cosines = torch.where(scale == 0, 0.0, inner[place] / scale)
                one_there, other_there = norms[0] > 0, norms[place + 1] > 0
                found[one, member] = (cosines.cpu().numpy(), one_there.cpu().numpy(), other_there.cpu().numpy())
        return [found[pair] for pair in pairs]

    def document_saliency(self, power: int) -> np.ndarray:
        if self.experts.num_experts and len(self.inputs.hidden) == 0:
            raise WinnowError("the calibration corpus is empty: it has no tokens")
        documents, count = int(self.inputs.document.max()) + 1, self.experts.num_experts
        sums, routed = self._zeros(documents * count), self._zeros(documents * count)
        widest = self.top_k * max(self.experts.hidden, 3 * self.experts.width)
        for places in torch.arange(len(self.inputs.hidden)).split(max(1, self.elements // widest)):
            probability = self._probabilities(places)
            gates, chosen = probability.topk(self.top_k, dim=1)
            expert, order = chosen.reshape(-1).sort(stable=True)
            ends = torch.bincount(expert, minlength=count).cumsum(0, dtype=torch.int32)
            token = order // self.top_k
            x = self._hidden(places)[token]
            output = self.experts.down(self.experts.activations(self.experts.gate_up(x, ends, expert)), ends, expert)
            values = gates.reshape(-1)[order] ** power * output.double().norm(dim=1)
            cells = self.inputs.document[places].to(expert.device)[token] * count + expert
            sums.index_add_(0, cells, values)
            routed += torch.bincount(cells, minlength=len(routed))
        means = torch.where(routed > 0, sums / routed, 0.0).view(documents, count)
        return means.mean(0).cpu().numpy()

    def channel_features(self) -> np.ndarray:
        module, count = self.experts.module, self.experts.num_experts
        gate_up, down = (tensor.detach().float().cpu() for tensor in (module.gate_up_proj, module.down_proj))
        if module.is_transposed:
            gate_up, down = gate_up.mT, down.mT
        gate, up = (columns.mT for columns in self.experts.gate_and_up(gate_up.mT))
        rows = torch.cat([gate, up, down.mT], dim=2).reshape(count * self.experts.width, -1)
        units = torch.nn.functional.normalize(rows, dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, components = torch.pca_lowrank(units, q=min(_COMPONENTS, *units.shape), niter=_ITERATIONS)
        features = ((units - units.mean(0)) @ components) * values
        return torch.nn.functional.normalize(features, dim=1).double().view(count, self.experts.width, -1).numpy()

    def _inner(self, one: int, members: Sequence[int], shuffled: int | None) -> tuple[Tensor, Tensor]:
        """Inner products (M, I, I) of the channels of ``one`` with those of each of the members, over tokens; and the
        squared norms (1 + M, I) of all of them."""
        width = self.experts.width
        inner, squares = self._zeros(len(members), width, width), self._zeros(1 + len(members), width)
        orders = {expert: self._order(expert, shuffled) for expert in (one, *members)}
        at_once = max(1, self.elements // max(self.experts.hidden, 3 * width))
        for start in range(0, self.tokens, at_once):
            some = slice(start, start + at_once)
            here = self._activations(one, orders[one][some])
            squares[0] += here.square().sum(0)
            for place, member in enumerate(members):
                there = self._activations(member, orders[member][some])
                inner[place] += here.T @ there
                squares[place + 1] += there.square().sum(0)
        return inner, squares

    def _order(self, expert: int, shuffled: int | None) -> Tensor:
        if shuffled is None:
            return self.places
        return self.places[torch.from_numpy(np.random.default_rng([shuffled, expert]).permutation(self.tokens))]

    def _activations(self, expert: int, places: Tensor) -> Tensor:
        """(n, I) float64: what goes into the down projection of the expert."""
        end = torch.full((1,), len(places), dtype=torch.int32, device=self.experts.device)
        own = torch.zeros(len(places), dtype=torch.int64, device=self.experts.device)
        gate_up = self.experts.gate_up(self._hidden(places), end, own, slice(expert, expert + 1))
        return self.experts.activations(gate_up).double()

    def _outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Places (n,), and the outputs (E, n, H) of all experts there."""
        widest = self.experts.num_experts * max(self.experts.hidden, 3 * self.experts.width)
        for places in self.places.split(max(1, self.elements // widest)):
            yield places, self.experts.outputs_of_all(self._hidden(places))

    def _hidden(self, places: Tensor) -> Tensor:
        return self.inputs.hidden[places].to(self.experts.device)

    def _probabilities(self, places: Tensor) -> Tensor:
        """(n, E) float64"""
        return torch.softmax(self.inputs.logits[places].to(self.experts.device).double(), dim=1)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.experts.device)
