"""What one pass over a corpus, or over a part of one, measured."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Part:
    """The place of a pass in a corpus that several passes share: it begins behind ``offset`` of ``total`` tokens.

    Tokens are counted in the order of a pass over the whole corpus (``batches.in_order_of_pass``).
    """

    offset: int
    total: int


@dataclass(frozen=True)
class AffineStep:
    """What the documents of a pass do to a moving average v: v -> ``decay`` * v + ``from_zero``.

    ``decay`` (E,) is 1 for experts that no document was routed to, and else below 1; ``from_zero`` is (E, ...). The
    first value of an expert begins its average, so an average that has not begun becomes the statistic instead.
    """

    decay: np.ndarray
    from_zero: np.ndarray


@dataclass(frozen=True)
class Collected:
    """What a pass over ``sequences`` sequences and ``tokens`` tokens measured.

    ``layers`` maps a decoder layer to its arrays by name (float64, see ``harness.contracts.statistics.STATISTICS``;
    always with ``frequency``); ``usage`` maps source -> layer (as text, as records have it) -> routed tokens
    of each expert. A pass over a part of a corpus says which ``part``, and what its documents do to moving averages:
    ``steps`` maps layer -> name -> that (``harness.calibration.merge`` puts parts together).
    """

    num_experts: int
    top_k: int
    n_group: int
    sequences: int
    tokens: int
    seconds: float
    layers: dict[int, dict[str, np.ndarray]]
    usage: dict[str, dict[str, list[int]]]
    part: Part | None = None
    steps: dict[int, dict[str, AffineStep]] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """The statistics that every layer has."""
        return frozenset.intersection(*(frozenset(arrays) for arrays in self.layers.values()))
