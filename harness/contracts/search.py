"""What a searched budget asks of the model before its method decides."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Protocol, cast

from harness.contracts.method import Method, SearchReport
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics

# MoE layer -> the experts that it keeps, in rising order; the others are gone with their router rows.
Kept = Mapping[int, Sequence[int]]

# How near the model's next-token distributions p, with the kept experts alone, are to those q of the intact model: the
# mean over the positions of the text of sum over the vocabulary of min(p, q), 1 where nothing has changed. One number
# for each of the Kept, which are looked at together.
Overlap = Callable[[Sequence[Kept]], list[float]]


class Search(Protocol):
    """What is to be seen: the overlap on ``samples`` token sequences of the calibration corpus, evenly spaced."""

    @property
    def samples(self) -> int: ...

    def at_once(self, layers: int) -> int:
        """How many ``Kept`` are looked at together, at most."""
        ...

    def evaluations(self, layers: int) -> int:
        """How many ``Kept`` are looked at in all, at most."""
        ...


class SearchingMethod(Method, Protocol):
    """A method whose budget is searched: it decides once ``with_budget`` has found one."""

    @property
    def search(self) -> Search: ...

    def with_budget(
        self, statistics: Statistics, shape: MoeShape, ratio: Fraction, seed: int, overlap: Overlap
    ) -> tuple[Method, SearchReport]:
        """The method that decides with the budget found. Raises WinnowError as ``check`` and ``decide`` do."""
        ...


def searching(method: Method) -> SearchingMethod | None:
    """The method itself where it asks for a search."""
    asks = getattr(method, "search", None) is not None
    return cast(SearchingMethod, method) if asks else None
