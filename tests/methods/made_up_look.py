"""A look at a layer token by token, by plain numpy: what the pass does on a model, for made-up outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def unit(values: np.ndarray, axis: int) -> np.ndarray:
    norms = np.linalg.norm(values, axis=axis, keepdims=True)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms != 0)


@dataclass(frozen=True)
class MadeUpLook:
    """``raw`` is one layer; ``channels`` (T, E, I) are made up, ``ends`` where its documents end."""

    raw: Any
    channels: np.ndarray
    ends: Sequence[int]

    @property
    def tokens(self) -> int:
        return len(self.raw.logits)

    @property
    def probability(self) -> np.ndarray:
        exponential = np.exp(self.raw.logits - self.raw.logits.max(1, keepdims=True))
        return exponential / exponential.sum(1, keepdims=True)

    def output_cosine(self) -> np.ndarray:
        units = unit(self.raw.outputs, 2)
        return np.einsum("tih,tjh->ij", units, units) / self.tokens

    def output_mean(self, gated: bool) -> np.ndarray:
        return (self.raw.outputs * (self.probability[:, :, None] if gated else 1.0)).mean(0)

    def channel_cosines(
        self, pairs: Sequence[tuple[int, int]], shuffled: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        def columns(expert: int) -> np.ndarray:
            values = self.channels[:, expert]
            if shuffled is None:
                return values
            return values[np.random.default_rng([shuffled, expert]).permutation(self.tokens)]

        found = []
        for one, other in pairs:
            a, b = unit(columns(one), 0), unit(columns(other), 0)
            found.append((a.T @ b, a.any(0), b.any(0)))
        return found

    def document_saliency(self, power: int) -> np.ndarray:
        gate = np.zeros_like(self.raw.logits)
        np.put_along_axis(gate, self.raw.indices, np.take_along_axis(self.probability, self.raw.indices, 1), 1)
        values = gate**power * np.linalg.norm(self.raw.outputs, axis=2)
        documents = zip(*(np.split(each, self.ends) for each in (values, gate > 0)), strict=True)
        return np.mean([v.sum(0) / np.maximum(routed.sum(0), 1) for v, routed in documents], axis=0)

    def channel_features(self) -> np.ndarray:
        experts, width = self.channels.shape[1:]
        return unit(np.random.default_rng(8).normal(size=(experts, width, 4)), 2)


def made_up_look(raw: Any, width: int, ends: Sequence[int], seed: int) -> MadeUpLook:
    channels = np.random.default_rng([seed, 9]).normal(size=(*raw.logits.shape, width))
    return MadeUpLook(raw, channels, ends)
