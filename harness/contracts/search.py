"""What a searched budget asks of the model before its method decides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from harness.contracts.method import Method
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics

# MoE layer -> the experts that it keeps, in rising order; the others are gone with their router rows.
Kept = Mapping[int, Sequence[int]]

# How near the model's next-token distributions p, with the kept experts alone, are to those q of the intact model: the
# mean over the positions of the text of sum over the vocabulary of min(p, q), 1 where nothing has changed. One number
# for each of the Kept, which are looked at together.
Overlap = Callable[[Sequence[Kept]], list[float]]


@dataclass(frozen=True)
class SearchReport:
    """How many experts each layer keeps by the search (``counts``), which looked at so many budgets (``evaluations``).

    ``fitness`` is the overlap of what was found, ``uniform`` that of equally many in every layer.
    """

    counts: dict[int, int]
    evaluations: int
    fitness: float
    uniform: float


class Search(Protocol):
    """What is to be seen: the overlap on ``samples`` token sequences of the calibration corpus, evenly spaced."""

    @property
    def samples(self) -> int: ...

    def evaluations(self, layers: int) -> int:
        """How many ``Kept`` are looked at, at most."""
        ...


class SearchingMethod(Method, Protocol):
    """A method whose budget is searched, unless ``search`` is None: it decides once ``with_budget`` has found one."""

    @property
    def search(self) -> Search | None: ...

    def with_budget(
        self, statistics: Statistics, shape: MoeShape, ratio: Fraction, seed: int, overlap: Overlap
    ) -> tuple[Method, SearchReport]:
        """The method that decides with the budget found. Raises WinnowError as ``check`` and ``decide`` do."""
        ...


def search_of(method: Method) -> Search | None:
    """What the method asks for, if it asks for a search."""
    return getattr(method, "search", None)
