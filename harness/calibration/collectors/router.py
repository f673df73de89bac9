"""Statistics of the router's output: scores, first choices, and how alike the logits of two experts are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.collectors.collector import sum_by_expert, zeros
from harness.calibration.collectors.events import RouterOutput
from harness.calibration.fused_experts import FusedExperts

_GRAM, _DISTANCE = "router_gram", "router_document_distance"


def score_sum(event: RouterOutput, experts: FusedExperts) -> Tensor:
    return event.scores.sum(0, dtype=torch.float64)


def top1_frequency(event: RouterOutput, experts: FusedExperts) -> Tensor:
    return torch.bincount(event.best.squeeze(1), minlength=experts.num_experts)


def top1_score_sum(event: RouterOutput, experts: FusedExperts) -> Tensor:
    score = event.scores.gather(1, event.best).double()
    return sum_by_expert(event.best.squeeze(1), score.squeeze(1), experts.num_experts)


@dataclass
class RouterGrams:
    """``router_gram`` and ``router_document_distance``, which reads the gram of each document.

    Per document, not per batch as in the REAP repository: so the distance does not depend on the batch size.
    """

    provides: ClassVar[frozenset[str]] = frozenset({_GRAM, _DISTANCE})
    sees: ClassVar[tuple[type, ...]] = (RouterOutput,)
    names: frozenset[str]
    experts: FusedExperts
    sums: dict[str, Tensor] = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.sums = {name: zeros(name, self.experts) for name in sorted(self.names)}

    def add(self, event: RouterOutput) -> None:
        self.tokens += event.layout.tokens
        if _DISTANCE not in self.sums:
            logits = event.real_logits.double()
            self.sums[_GRAM] += logits.T @ logits
            return
        for start, end in event.layout.documents:
            document = event.logits[start:end].double()
            gram = document.T @ document
            if _GRAM in self.sums:
                self.sums[_GRAM] += gram
            norms = gram.diagonal().sqrt()
            cosine = gram / torch.outer(norms, norms).clamp_min(1e-8)
            self.sums[_DISTANCE] += (1.0 - cosine) * (end - start)

    def running(self) -> Mapping[str, Tensor]:
        return self.sums

    def arrays(self) -> dict[str, np.ndarray]:
        found = {name: total.cpu().numpy() for name, total in self.sums.items()}
        if _DISTANCE in found:
            found[_DISTANCE] = found[_DISTANCE] / self.tokens
            np.fill_diagonal(found[_DISTANCE], 0.0)
        return found
