"""What a claim is made of: its words for measures, contrasts of cells, and the four tests."""

from dataclasses import dataclass

from reports.claims.selection import Cell

# What claims call the averages over the tasks of a panel (``reports.numbers.measures``), whatever tasks these are.
GENERATION, CHOICE, PERPLEXITY = "generation", "multiple_choice", "perplexity"


def said(name: str) -> str:
    """What an average is called in words."""
    return name.replace("_", " ")


@dataclass(frozen=True)
class Contrast:
    """The sum of weight x measure over cells is above the threshold (measures by their name in the claims' table)."""

    name: str
    terms: tuple[tuple[float, str, Cell], ...]
    threshold: float = 0.0


@dataclass(frozen=True)
class AllAbove:
    """Every contrast is above its threshold."""

    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class RanksFollow:
    """Over cells and layers, the second measure rises with the first (Spearman's rho above 0).

    Whole cells and whole layers are permuted: of two cells, or layers, of one kind the second proves little.
    """

    first: str
    second: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class RanksDiffer:
    """Some cell is better than another by the first measure and worse by the second.

    Tests every pair, corrected for their number; the contrary is that both measures put every pair in the same order.
    ``least`` cells are needed; those that are missing beyond that are left out.
    """

    first: str
    second: str
    cells: tuple[Cell, ...]
    least: int = 3


@dataclass(frozen=True)
class FewLargeGroups:
    """In the layers of the cells most groups are single experts, and the largest is many times the mean group.

    Counts of the plans, not samples: holds where it is so in at least nine of ten layers, does not hold where in half
    of them or fewer, else undecided.
    """

    cells: tuple[Cell, ...]
    singletons: float = 0.5
    times_mean: float = 4.0


@dataclass(frozen=True)
class Claim:
    """``suite`` names the one whose scores are needed, where the reference suite lacks them; ``also`` holds what else a
    command has to say so that a cell leaves what is needed.
    """

    id: str
    says: str
    source: str
    test: AllAbove | RanksFollow | RanksDiffer | FewLargeGroups
    suite: str = ""
    also: tuple[str, ...] = ()

    def cells(self) -> tuple[Cell, ...]:
        """Every cell that the test looks at, in its order."""
        if not isinstance(self.test, AllAbove):
            return self.test.cells
        return tuple(dict.fromkeys(cell for one in self.test.contrasts for *_, cell in one.terms))
