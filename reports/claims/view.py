"""A panel as claims see it: its averages, its cells by what they are, and comparisons of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reports.claims.corpora import Corpora
from reports.claims.selection import Cell, matches
from reports.claims.vocabulary import CHOICE, GENERATION, PERPLEXITY, Contrast, said
from reports.numbers.broken import faults
from reports.numbers.contrasts import Comparer, Term
from reports.numbers.load import Panel, Row
from reports.numbers.measures import averages, reference_columns
from reports.numbers.paired import Comparison
from reports.numbers.probes import LAYERS
from reports.numbers.statistics import Measure

NOT_RUN, BROKEN, NOT_MEASURED = "not run", "broken", "not measured"


@dataclass(frozen=True)
class Missing:
    cell: Cell
    why: str


@dataclass
class View:
    """``averages`` are those over a panel's tasks, by what claims call them; ``folder`` is where its records lie."""

    panel: Panel
    measures: Mapping[str, Measure]
    comparer: Comparer = field(default_factory=Comparer)
    folder: Path | None = None
    averages: Mapping[str, Measure] = field(default_factory=dict)
    corpora: Corpora = Corpora((), ())

    def __post_init__(self) -> None:
        stand = averages(reference_columns(self.panel.records(), self.panel.baseline_record()))
        of_kinds = {GENERATION: stand.generative, CHOICE: stand.choice, PERPLEXITY: stand.perplexity}
        self.averages = {**stand.domains, **{name: m for name, m in of_kinds.items() if m is not None}}
        self.corpora = Corpora(tuple(self.panel.corpora()), tuple(stand.domains))
        self._rows: dict[Cell, Row | None] = {}

    def model(self) -> str:
        """What tells its model from others, whatever it is called."""
        records = self.panel.records()
        return records[0].fingerprints.get("model", self.panel.model) if records else self.panel.model

    def measure(self, name: str) -> Measure:
        """Raises KeyError where the panel has no tasks of that kind or domain."""
        return self.averages[name] if name in self.averages else self.measures[name]

    def knows(self, name: str) -> bool:
        return name in self.averages or name in self.measures

    def row(self, cell: Cell) -> Row | None:
        """The row of a cell, that of most seeds where several match."""
        if cell not in self._rows:
            found = [row for row in self.panel.all_rows() if matches(cell, row)]
            self._rows[cell] = max(found, key=lambda row: len(row.records)) if found else None
        return self._rows[cell]

    def lacks(self, cell: Cell, *names: str) -> Missing | None:
        """Why the measures of a cell cannot be compared; None where they can."""
        row = self.row(cell)
        if row is None:
            return Missing(cell, NOT_RUN)
        if row.odd:
            return Missing(cell, f"was made from another {' and '.join(row.odd)} than the other cells")
        for name in names:
            if not self.knows(name):
                return Missing(cell, f"suite={self.panel.suite} has no tasks of {said(name)}")
            measure = self.measure(name)
            if self.comparer.value(measure, row) is None:
                return Missing(cell, self._why_missing(measure, row))
        return None

    def missing(self, contrast: Contrast) -> list[Missing]:
        """What a contrast of concrete corpora lacks."""
        found = [self.lacks(cell, name) for _, name, cell in contrast.terms]
        return list(dict.fromkeys(one for one in found if one is not None))

    def compare(self, contrast: Contrast) -> Comparison | None:
        """None where something is missing, or cells were not made from the same."""
        if self.missing(contrast):
            return None
        rows = [(weight, self.measure(name), self.row(cell)) for weight, name, cell in contrast.terms]
        return self.comparer.compare([Term(weight, m, row) for weight, m, row in rows if row is not None])

    def _why_missing(self, measure: Measure, row: Row) -> str:
        tasks = list(dict.fromkeys(part.task for part in measure.parts))
        broken = [fault for record in row.records for task in tasks for fault in faults(record, task)]
        if broken:
            return f"{BROKEN} ({'; '.join(broken)})"
        left_out = [why for record in row.records for task, why in record.not_measured.items() if task in tasks]
        if left_out:
            return f"{NOT_MEASURED} ({'; '.join(dict.fromkeys(left_out))})"
        if tasks == [LAYERS]:
            return f"was run without diagnostics=layers, which measures {measure.label}"
        told = (s.task for record in self.panel.records() for s in record.scores)
        if not {*tasks} & {*told}:
            return f"suite={self.panel.suite} does not measure {measure.label}"
        of = "of other cells'" if self.panel.baseline is None else "of the baseline's"
        return f"lacks a score {of}: {measure.label} is not formed over fewer tasks"
