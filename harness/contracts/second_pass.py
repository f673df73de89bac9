"""What a method asks for that has to see some experts again, once it has chosen them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from harness.contracts.method import Decision, Method
from harness.contracts.statistics import Statistics


@dataclass(frozen=True)
class Look:
    """Of which experts of a layer moments are to be collected, n of them.

    Moments are of the input x around ``inputs`` (n, H) and of the output f around ``outputs`` (n, H), an expert a row,
    so that no large mean takes their digits. The input's products are those of its coordinates in the d columns of
    ``basis`` (H, d), or with None (d = H) of x itself. Tokens weigh 1, or with ``gate_squared`` g_tj squared.
    """

    experts: Sequence[int]
    inputs: np.ndarray
    outputs: np.ndarray
    basis: np.ndarray | None = None
    gate_squared: bool = False

    @property
    def rank(self) -> int:
        """d"""
        return self.inputs.shape[1] if self.basis is None else self.basis.shape[1]


@dataclass(frozen=True)
class Moments:
    """Sums over the routed tokens of each of the n experts of a ``Look``, each token with its weight.

    x and f are those around the given means, z the d coordinates of x in the basis, h the I activations before the down
    projection. All are float64.
    """

    weight: np.ndarray  # (n,) of the weights
    inputs: np.ndarray  # (n, H) of x
    outputs: np.ndarray  # (n, H) of f
    channels: np.ndarray  # (n, I) of h
    coordinates: np.ndarray  # (n, d) of z
    input_square: np.ndarray  # (n,) of |x|^2
    output_square: np.ndarray  # (n,) of |f|^2
    products: np.ndarray  # (n, d, d) of z z^T
    mixed: np.ndarray  # (n, I, d) of h z^T


# Layer -> its moments; each is read when it is asked for, since those of all layers may not fit in memory.
Seen = Callable[[int], Moments]


class SecondPass(Method, Protocol):
    """A method whose ``decide`` chooses experts, and that decides about them once it has seen their moments."""

    def looks_again_at(self, statistics: Statistics, decision: Decision) -> Mapping[int, Look]:
        """Layer -> what it wants to see there; empty where ``decision`` stands as it is."""
        ...

    def finish(self, statistics: Statistics, decision: Decision, seen: Seen) -> Decision:
        """The final decision. ``seen`` knows the layers of ``looks_again_at``."""
        ...


def second_pass(method: Method) -> SecondPass | None:
    """The method itself where it asks for one."""
    return cast(SecondPass, method) if hasattr(method, "looks_again_at") else None
