"""What a claim is made of: its words for measures and corpora, contrasts of cells, and the tests."""

from dataclasses import dataclass

from reports.claims.selection import Cell

# What claims call the averages over the tasks of a panel (``reports.numbers.measures``), whatever tasks these are.
GENERATION, CHOICE, PERPLEXITY = "generation", "multiple_choice", "perplexity"
# Rules for the calibration corpus, which a cell may name in place of one (``reports.claims.corpora``).
MATCHED, SHIFTED, GENERAL, MIXED, EVERY = "matched", "shifted", "general", "mixed", "every corpus"
NO_CORPUS, ACROSS = "no corpus", "across corpora"
RULES = {
    MATCHED: "each domain is scored on the model that was calibrated on that domain",
    SHIFTED: "each domain is scored on the models that were calibrated on the other domains",
    GENERAL: "calibrated on general text",
    MIXED: "calibrated on a mix of all domains",
    EVERY: "on every corpus of the sweep",
    f"{MATCHED} and {GENERAL}": "calibrated on the domain that is scored, set against general text",
    ACROSS: "what is left after calibration on one corpus is set against what is left after another",
    NO_CORPUS: "nothing that is calibrated is compared",
}


def said(name: str) -> str:
    """What an average is called in words."""
    return name.replace("_", " ")


@dataclass(frozen=True)
class Contrast:
    """A sum of weight x measure over cells (measures by their name in the claims' table), and what is said of it.

    ``margin`` is the smallest effect that matters, in the unit of the measure (perplexity: of its logarithm). Without
    ``least`` the claim says that the effect is there, above the margin. With it, that the effect is above ``least``:
    a size that was stated, or below 0 a loss that is at most as large.
    """

    name: str
    terms: tuple[tuple[float, str, Cell], ...]
    margin: float
    least: float | None = None

    @property
    def bar(self) -> float:
        """Above this the claim holds."""
        return self.margin if self.least is None else self.least


@dataclass(frozen=True)
class Contrasts:
    """Every contrast is as said; with ``some`` at least one of them."""

    contrasts: tuple[Contrast, ...]
    some: bool = False


@dataclass(frozen=True)
class RanksAgree:
    """Spearman's rho of two measures, better with better, over cells: below ``bar``, or with ``above`` above it.

    ``second_cells`` are those that the second measure is taken of, one for each (empty: the same). At least ``fewest``
    cells are needed; those that are missing beyond that are left out.
    """

    first: str
    second: str
    cells: tuple[Cell, ...]
    bar: float
    above: bool = False
    second_cells: tuple[Cell, ...] = ()
    fewest: int = 5


@dataclass(frozen=True)
class FollowsWithin:
    """Within each cell (a method at a ratio), the layer of larger ``first`` has the larger ``second``. A count."""

    first: str
    second: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class FewLargeGroups:
    """In the layers of the cells most groups are single experts, and the largest is many times the mean group.

    Counts of the plans, not samples: holds where it is so in at least nine of ten layers, reversed where in half of
    them or fewer, else undecided.
    """

    cells: tuple[Cell, ...]
    singletons: float = 0.5
    times_mean: float = 4.0


@dataclass(frozen=True)
class KeptDiffer:
    """Pairs of cells keep different experts: Jaccard's index is below ``bar`` in at least nine of ten layers. A count.

    ``bar`` 1 asks for one expert that differs.
    """

    pairs: tuple[tuple[Cell, Cell], ...]
    bar: float = 1.0


@dataclass(frozen=True)
class LongTail:
    """On each source of text, the most used quarter of a layer's experts takes more than ``share`` of the tokens."""

    cells: tuple[Cell, ...]
    share: float = 0.5


@dataclass(frozen=True)
class DependsMost:
    """Over calibration corpora, the standard deviation of a measure is larger of one method than of each other.

    By the margin. Methods that were not run on all the corpora are left out; at least ``fewest`` others are needed.
    """

    method: str
    others: tuple[str, ...]
    ratio: float
    measure: str
    margin: float
    corpora: tuple[str, ...] = ("mixed", "code", "math", "writing")
    fewest: int = 3

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for method in (self.method, *self.others) for cell in self.cells_of(method))

    def cells_of(self, method: str) -> tuple[Cell, ...]:
        return tuple(Cell(method, self.ratio, corpus) for corpus in self.corpora)


@dataclass(frozen=True)
class Needs:
    """What cannot be tested by cells that this version can run, and what it would take."""

    what: str


Test = Contrasts | RanksAgree | FollowsWithin | FewLargeGroups | KeptDiffer | LongTail | DependsMost | Needs


@dataclass(frozen=True)
class Claim:
    """``corpus`` is one of ``RULES``; ``suite`` names the one whose scores are needed, where the reference suite lacks
    them; ``also`` holds what else a command has to say so that a cell leaves what is needed; ``note`` limits what the
    verdict says. ``headline`` claims open reports. ``experiment`` names the one that runs its cells, if not ``claims``.
    """

    id: str
    says: str
    source: str
    corpus: str
    test: Test
    suite: str = ""
    also: tuple[str, ...] = ()
    note: str = ""
    headline: bool = False
    experiment: str = ""

    def cells(self) -> tuple[Cell, ...]:
        """Every cell that the test looks at, in its order; corpora by their rule."""
        test = self.test
        if isinstance(test, Contrasts):
            return tuple(dict.fromkeys(cell for one in test.contrasts for *_, cell in one.terms))
        if isinstance(test, KeptDiffer):
            return tuple(dict.fromkeys(cell for pair in test.pairs for cell in pair))
        if isinstance(test, Needs):
            return ()
        return test.cells + (test.second_cells if isinstance(test, RanksAgree) else ())
