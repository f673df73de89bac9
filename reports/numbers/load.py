"""Reads a sweep's folder into panels of rows: everything a report is computed from. Needs neither torch nor a
model.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.contracts.record import STAGES, Record, Score
from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.numbers.broken import faults
from reports.numbers.comparable import odd_ones
from reports.numbers.diagnosed import read_diagnostics
from reports.numbers.models import telling_names
from reports.numbers.statistics import Items

BASELINE_METHOD = "none"
NO_CORPUS = "none"
RowKey = tuple[str, float, str]
# What may differ between two cells without a reader having to be told.
_SILENT = (
    "output_dir",
    "tracking",
    "launcher",
    "hydra",
    *STAGES,  # the cell tells each in a word
    "diagnostics",  # what is measured besides
    "baseline",  # tables say whether there is one
    "progress",
    "seed",
    "ratio",
    "method.name",
    "method._target_",
)


@dataclass(frozen=True)
class Row:
    """Cells that differ in nothing but their seed. ``items`` holds the samples of each record, where kept; ``odd``
    names what they were made from that is not what the panel's other rows were made from."""

    method: str
    ratio: float
    calibration: str
    records: tuple[Record, ...]
    items: tuple[Items | None, ...]
    odd: tuple[str, ...] = ()

    @property
    def key(self) -> RowKey:
        """Tells the row from the others of its panel."""
        return self.calibration, self.ratio, self.method

    @property
    def level(self) -> tuple[float, tuple[str, ...]]:
        """Rows compete for the best with those of their ratio that were repaired from calibration text as they were."""
        return self.ratio, self.records[0].recovered()

    @property
    def label(self) -> str:
        """The method as tables name it: with a word where a cell of the row is broken, or made from something else."""
        marks = ["broken"] if any(faults(record) for record in self.records) else []
        marks += [f"other {what}" for what in self.odd]
        return f"{self.method} ({', '.join(marks)})" if marks else self.method


@dataclass(frozen=True)
class Panel:
    """The rows that share a model, suite, backend and baseline, sorted by corpus, ratio and method."""

    model: str
    suite: str
    backend: str
    baseline: Row | None
    rows: tuple[Row, ...]

    def corpora(self) -> list[str]:
        """The calibration corpora; methods that use none do not add one unless there is no other."""
        names = sorted({row.calibration for row in self.rows})
        return [name for name in names if name != NO_CORPUS] or names

    def of_corpus(self, corpus: str) -> list[Row]:
        """The rows calibrated on a corpus and those that need no calibration, by ratio and method."""
        rows = [row for row in self.rows if row.calibration in (corpus, NO_CORPUS)]
        return sorted(rows, key=lambda row: (row.ratio, row.method))

    def all_rows(self) -> list[Row]:
        return ([] if self.baseline is None else [self.baseline]) + list(self.rows)

    def records(self) -> list[Record]:
        return [record for row in self.all_rows() for record in row.records]

    def baseline_record(self) -> Record | None:
        return None if self.baseline is None else self.baseline.records[0]


def load_panels(folder: Path) -> list[Panel]:
    """Raises WinnowError where the folder has no records, or one of them is damaged or cannot be told
    apart.
    """
    panels, damaged = load_sound(folder)
    if damaged:
        raise WinnowError(damaged[0])
    return panels


def load_sound(folder: Path) -> tuple[list[Panel], list[str]]:
    """The panels without the cells of which a file is damaged, and a line for each of those, which names the file.

    Raises WinnowError where no cell is sound, or two cannot be told apart.
    """
    if not folder.is_dir():
        raise WinnowError(f"there is no folder {folder}: give the output_dir of a run")
    damaged: list[str] = []
    stored = _read(folder, "records", damaged)
    baselines = _read(folder, "baseline", damaged) + [one for one in stored if one[0].is_uncompressed()]
    cells = [one for one in stored if not one[0].is_uncompressed()]
    if damaged and not cells and not baselines:
        raise WinnowError(f"no sound record in {folder}: {damaged[0]}")
    if not cells and not baselines:
        raise WinnowError(f"no records in {folder / 'records'}: run `winnow output_dir={folder} ...` first")
    found: dict[tuple[str, ...], list[tuple[Record, Items | None]]] = defaultdict(list)
    with_id = {record.cell["id"]: (record, items) for record, items in baselines}
    for record, items in cells:
        match = _baseline_of(record, [baseline for baseline, _ in baselines])
        beside = record.fingerprints.get("model", "") if match is None else match.cell["id"]
        found[(*_panel_key(record), beside)].append((record, items))
    if not cells:
        for record, _ in baselines:
            found[(*_panel_key(record), record.cell["id"])] = []
    panels = [
        _panel(model, suite, backend, _baseline_row(with_id.get(baseline)), of_panel)
        for (model, suite, backend, baseline), of_panel in sorted(found.items())
    ]
    names = telling_names([panel.records()[0] for panel in panels])
    return [replace(panel, model=name) for panel, name in zip(panels, names, strict=True)], damaged


def _read(folder: Path, kind: str, damaged: list[str]) -> list[tuple[Record, Items | None]]:
    """Every sound cell; ``damaged`` gets a line for each other one."""
    store = RecordStore(folder, kind)
    found = []
    for cell in store.ids():
        try:
            record = store.read(cell)
            table = store.read_table(cell, ["task", "domain", "item", "score", "weight"], record)
            if kind == "records":
                record = replace(record, scores=record.scores + _layer_scores(folder, cell))
            found.append((record, None if table is None else Items.from_columns(table.to_pydict())))
        except WinnowError as error:
            damaged.append(str(error))
    return found


def _layer_scores(folder: Path, cell: str) -> list[Score]:
    found = read_diagnostics(folder, cell)
    return [] if found is None else found["scores"]


def _panel_key(record: Record) -> tuple[str, str, str]:
    model, suite, backend = (str(record.cell.get(name) or "") for name in ("model", "suite", "backend"))
    return model, suite, backend


def _baseline_of(record: Record, baselines: Sequence[Record]) -> Record | None:
    """The baseline that the cell names, else the one of its model, suite and backend that agrees with it
    most.
    """
    named = record.cell.get("baseline")
    if named is not None:
        return next((baseline for baseline in baselines if baseline.cell["id"] == named), None)

    def agreement(baseline: Record) -> int:
        same_model = record.fingerprints.get("model") == baseline.fingerprints.get("model")
        sections = [record.config.get(name) == baseline.config.get(name) for name in ("suite", "backend", "model")]
        return 4 * same_model + sum(sections)

    fitting = [baseline for baseline in baselines if _panel_key(baseline) == _panel_key(record)]
    if not fitting:
        return None
    best = max(agreement(baseline) for baseline in fitting)
    closest = [baseline for baseline in fitting if agreement(baseline) == best]
    if len(closest) > 1:
        names = " and ".join(baseline.cell["id"] for baseline in closest)
        raise WinnowError(
            f"{record.cell['id']} may belong to either baseline {names}: keep such runs in separate folders"
        )
    return closest[0]


def _baseline_row(stored: tuple[Record, Items | None] | None) -> Row | None:
    if stored is None:
        return None
    return Row("baseline", 0.0, NO_CORPUS, (stored[0],), (stored[1],))


def _panel(model: str, suite: str, backend: str, baseline: Row | None, stored: Sequence) -> Panel:
    odd = odd_ones([record for record, _ in stored], None if baseline is None else baseline.records[0])
    rows = [
        replace(row, odd=tuple(dict.fromkeys(what for one in row.records for what in odd.get(one.cell["id"], []))))
        for row in _rows(stored)
    ]
    return Panel(model, suite, backend, baseline, tuple(rows))


def _rows(stored: Iterable[tuple[Record, Items | None]]) -> tuple[Row, ...]:
    cells = sorted(stored, key=lambda one: one[0].cell["id"])
    labels = _labels([record for record, _ in cells])
    grouped: dict[tuple[str, float, str], list[tuple[Record, Items | None]]] = defaultdict(list)
    for record, items in cells:
        name = labels[record.cell["id"]]
        grouped[(_corpus(record), float(record.cell["ratio"]), name)].append((record, items))
    rows = []
    for (corpus, ratio, name), members in sorted(grouped.items()):
        rows.append(
            Row(
                name,
                ratio,
                corpus,
                tuple(record for record, _ in members),
                tuple(items for _, items in members),
            )
        )
    return tuple(rows)


def _corpus(record: Record) -> str:
    return str(record.cell.get("calibration") or NO_CORPUS)


def _labels(records: Sequence[Record]) -> dict[str, str]:
    """The method's name, with the settings that tell its cells apart where name, ratio, corpus, seed and stages do not;
    behind it the stages.
    """
    alike: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        cell = record.cell
        key = cell["method"], float(cell["ratio"]), _corpus(record), cell["seed"], *record.stages()
        alike[key].append(record)
    telling: dict[str, set[str]] = defaultdict(set)
    for (method, *_), members in alike.items():
        if len(members) < 2:
            continue
        settings = [_settings(member) for member in members]
        names = {name for flat in settings for name in flat if len({str(f.get(name)) for f in settings}) > 1}
        if len({tuple(str(flat.get(name)) for name in sorted(names)) for flat in settings}) < len(members):
            ids = " and ".join(member.cell["id"] for member in members)
            raise WinnowError(f"{ids} have the same settings: remove one, or keep them in folders of their own")
        telling[method] |= names
    return {record.cell["id"]: _label(record, sorted(telling[record.cell["method"]])) for record in records}


def _label(record: Record, names: Sequence[str]) -> str:
    flat = _settings(record)
    settings = ", ".join(f"{name.removeprefix('method.')}={flat.get(name)}" for name in names)
    method = "baseline" if record.cell["method"] == BASELINE_METHOD else str(record.cell["method"])
    return " ".join(filter(None, [method, settings and f"({settings})", *record.stages()]))


def _settings(record: Record) -> dict[str, Any]:
    """What may tell the record from others of its method: its configuration, and the versions it was made with."""
    tasks = {f"version of {task}": version for task, version in record.task_versions.items()}
    return _flat(record.config) | {"version": record.method_version} | tasks


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``, without the silent settings."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in _SILENT:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
