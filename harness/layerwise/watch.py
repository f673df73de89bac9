"""What goes through one MoE layer, kept on the host until the method has decided about the layer."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.calibration.batches import BatchLayout, evenly_spaced
from harness.calibration.fused_experts import FusedExperts
from harness.calibration.recorder import Recorder
from harness.contracts.method import Decision
from harness.contracts.plan_files import plan_from_json, plan_to_json
from harness.contracts.statistics import Statistics
from harness.families.moe_block import MoeBlock
from harness.layerwise.look import Inputs, Look

_DECISION, _SALIENCY, _GROUPS, _USAGE = "decision", "saliency", "groups", "recorder/"


@dataclass
class LayerWatch:
    """Observer of the layer that ``recorder`` records. When all batches are through it, ``decision`` is about it.

    ``like`` has what is known without a pass, ``top_k`` is the model's own. ``limit`` tokens, evenly spaced, stand for
    all (None: all do), and no others are kept unless ``every_token`` says so: T x H numbers of the model's format, and
    T x E logits.
    """

    recorder: Recorder
    decide: Callable[[Statistics], Decision]
    like: Statistics
    top_k: int
    limit: int | None = None
    every_token: bool = False
    found: Decision | None = None
    _parts: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def layer(self) -> int:
        return self.recorder.layer

    @property
    def decision(self) -> Decision:
        assert self.found is not None
        return self.found

    @contextmanager
    def watching(self, block: MoeBlock) -> Iterator[None]:
        self._parts = {"hidden": [], "logits": [], "document": []}
        self._seen = self._documents = 0
        self._wanted = evenly_spaced(self.like.tokens, None if self.every_token else self.limit)
        handles = [
            block.router.register_forward_hook(self._keep_logits),
            block.experts.register_forward_pre_hook(self._keep_hidden),
        ]
        try:
            with self.recorder.watching(block):
                yield
        finally:
            for handle in handles:
                handle.remove()
        inputs = Inputs(**{name: torch.cat(parts) for name, parts in self._parts.items()})
        self._parts = {}
        look = Look(FusedExperts(block.experts), inputs, self.top_k, self.limit)
        layers = {self.layer: self.recorder.arrays}
        self.found = self.decide(replace(self.like, layers=layers, look=lambda layer: look))

    def start_batch(self, layout: BatchLayout) -> None:
        self.recorder.start_batch(layout)
        real = layout.real.nonzero().squeeze(1)
        here = (self._wanted >= self._seen) & (self._wanted < self._seen + len(real))
        places = self._wanted[here] - self._seen
        self._positions = real[places]
        lengths = torch.tensor([end - start for start, end in layout.documents])
        numbers = torch.arange(len(lengths)).repeat_interleave(lengths) + self._documents
        self._parts["document"].append(numbers[places])
        self._seen += len(real)
        self._documents += len(lengths)

    def end_batch(self) -> None:
        self.recorder.end_batch()

    def state(self) -> dict[str, np.ndarray]:
        decision = self.decision
        found = {f"{_USAGE}{name}": array for name, array in self.recorder.state().items()}
        found[_DECISION] = np.array(json.dumps(plan_to_json(decision.plan)))
        if decision.saliency is not None:
            found[_SALIENCY] = decision.saliency[self.layer]
        if decision.groups is not None:
            found[_GROUPS] = np.array(decision.groups[self.layer])
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        own = {name.removeprefix(_USAGE): array for name, array in state.items() if name.startswith(_USAGE)}
        self.recorder.restore(own)
        self.found = Decision(
            plan_from_json(json.loads(str(state[_DECISION]))),
            saliency={self.layer: state[_SALIENCY]} if _SALIENCY in state else None,
            groups={self.layer: state[_GROUPS].tolist()} if _GROUPS in state else None,
        )

    def _keep_logits(self, module: Any, args: Any, output: Any) -> None:
        named = dict(zip(self.recorder.router_output, output, strict=True))
        self._keep("logits", named["logits"])

    def _keep_hidden(self, module: Any, args: Any) -> None:
        self._keep("hidden", args[0])

    def _keep(self, name: str, values: Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1])
        self._parts[name].append(rows[self._positions.to(rows.device)].detach().cpu())
