"""The command ``winnow-report``: from a folder of records to tables, figures and a page of Markdown."""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import WinnowError
from harness.files import write_files
from reports.claims import report as claims_report
from reports.claims.opening import opening as opening_of_claims
from reports.claims.tested import claims_of
from reports.figures import drift as drift_figures
from reports.figures import scores as figures
from reports.figures.corpora import NOTE as TRANSFER_NOTE
from reports.figures.corpora import corpus_transfer
from reports.figures.drawn import Drawing, digest, drawing, row_hash
from reports.figures.reliability import NOTE as RELIABILITY_NOTE
from reports.figures.reliability import reliability_diagram
from reports.numbers.baselines import absent, elsewhere
from reports.numbers.broken import failed_cells
from reports.numbers.contrasts import Comparer
from reports.numbers.load import NO_CORPUS, Panel, load_sound
from reports.numbers.measures import Results, evaluate
from reports.numbers.usage import Usage, collect_usage
from reports.numbers.versions import versions_note
from reports.page.build import report_page
from reports.page.data import damaged_plans
from reports.page.embed import PAGE
from reports.tables import layers
from reports.tables.answers import calibration_table, consistency_table, shift_table
from reports.tables.comparisons import baseline_tests, best_tests
from reports.tables.diagnostics import drift_table, generation_table
from reports.tables.formats import Table, in_markdown, to_latex, to_markdown
from reports.tables.published import published_table
from reports.tables.recovery import recovery_table
from reports.tables.scores import (
    cost_table,
    difference_table,
    domain_table,
    main_table,
    to_csv,
    usage_table,
)
from reports.wandb import report as wandb_report

_DESCRIPTION = """\
Reads FOLDER/records and FOLDER/baseline, as `winnow output_dir=FOLDER ...` leaves them, and writes
  report.md   every table and figure, each with a sentence on how it was computed
  table.csv   the main table and its differences from the baseline as plain numbers (shares from 0 to 1)
  table.tex   the main table and its differences for LaTeX (needs the packages booktabs and graphicx)
  *.png, *.pdf  the figures
  page.html   all of it to sort, filter and point at, with each cell's plan and texts; needs no network

It can be run while a sweep is still at work: it shows the cells that are finished. Differences from the
baseline are paired item by item where the .parquet files lie beside the records, else unpaired.

`winnow-report claims FOLDER` tests the claims of the literature instead (`winnow-report claims --help`).
`winnow-report wandb FOLDER` makes a dashboard on Weights & Biases (`winnow-report wandb --help`).
`winnow-report migrate FOLDER` brings records of older versions of winnow up to date, so that a sweep goes on from them.
"""

_MIGRATION = """Brings the records in FOLDER to today's form and ids: no number changes, and the id that a cell had
stays in its record as `was`. Samples, plans and diagnostics are renamed with their record. It can be stopped and
started again."""
_STAR = "; a star is the uncompressed model"
_BY_SIZE = (
    f"The same scores over the bytes of the weight files, on a logarithmic axis{_STAR}. "
    "Methods are set apart by up to 3 % of the size, so that intervals do not hide each other."
)
_OF_CORPUS = {
    "score_against_ratio": figures.score_against_ratio,
    "score_against_bytes": figures.score_against_bytes,
    "drift_by_position": drift_figures.drift_by_position,
    "reliability": reliability_diagram,
}
_MULTIPLES = " and perplexity as a multiple of the baseline's"
_NO_MULTIPLES = ", without perplexity, which is shown as a multiple of the baseline's, of which there is no record"


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["claims"]:
        return claims_report.main(words[1:])
    if words[:1] == ["wandb"]:
        return wandb_report.main(words[1:])
    if words[:1] == ["migrate"]:
        return _migrate(words[1:])
    parser = argparse.ArgumentParser(
        "winnow-report", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output_dir of a sweep, e.g. results/demo")
    parser.add_argument("--out", metavar="DIR", type=Path, default=None, help="where to write (default: FOLDER/report)")
    options = parser.parse_args(words)
    try:
        report = write_report(options.folder, options.out or options.folder / "report")
    except WinnowError as error:
        print(f"winnow-report: error: {error}", file=sys.stderr)
        return 2
    print(f"report written to {report}")
    return 0


def _migrate(arguments: Sequence[str]) -> int:
    """``winnow-report migrate``."""
    parser = argparse.ArgumentParser("winnow-report migrate", description=_MIGRATION)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output_dir of a sweep, e.g. results/demo")
    options = parser.parse_args(arguments)
    from harness.cells.migrate import migrate  # what cells are made of needs torch, which no report does

    try:
        changed, found = migrate(options.folder)
    except WinnowError as error:
        print(f"winnow-report: error: {error}", file=sys.stderr)
        return 2
    print(f"{changed} of {found} records in {options.folder} migrated, {found - changed} were up to date")
    return 0


def write_report(folder: Path, out: Path) -> Path:
    """Writes the report and returns the path of report.md.

    What is damaged is left out, and told at the beginning of the report and on stderr. Raises WinnowError where there
    is no sound record, or ``out`` cannot be written.
    """
    panels, damaged = load_sound(folder)
    damaged += damaged_plans(folder, panels)
    for line in damaged:
        print(f"winnow-report: left out: {line}", file=sys.stderr)
    opening = _opening(panels, failed_cells(folder), damaged)
    opening += versions_note([record for panel in panels for record in panel.records()], folder)
    all_results = [evaluate(panel) for panel in panels]
    verdicts = _verdicts(folder, panels)
    drawings: dict[str, Drawing] = {}
    for number, results in enumerate(all_results):
        drawings |= _drawings(folder, _prefix(number, panels), results)
    with drawing(drawings, out) as finished:
        sections, latex = _sections(folder, all_results)
        contents: dict[Path, bytes] = {
            out / "table.csv": to_csv(all_results).encode(),
            out / "table.tex": "\n".join(latex).encode(),
            out / PAGE: report_page(folder, out, all_results, opening),
        }
        drawn = finished()
    head = [f"# {in_markdown(folder.resolve().name)}", ""]
    head += [line for sentence in (*verdicts, opening) for line in (in_markdown(sentence), "")]
    text = head + [line for section in sections for line in _resolved(section, drawn.shown)]
    write_files(drawn.contents | contents | {out / "report.md": "\n".join(text).encode()})
    return out / "report.md"


def _verdicts(folder: Path, panels: Sequence[Panel]) -> list[str]:
    """Five sentences made of the verdicts on claims; the error where what they are made of is damaged."""
    try:
        return opening_of_claims(claims_of([(folder, panels)], by_corpus=False).findings)
    except WinnowError as error:
        return [f"Claims were not tested: {error}"]


@dataclass(frozen=True)
class Pictures:
    """Figures by their names, and what stands before and behind them; nothing of it where none shows anything."""

    names: tuple[str, ...]
    behind: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def _resolved(section: str | Pictures, shown: Collection[str]) -> list[str]:
    if isinstance(section, str):
        return [section]
    names = [name for name in section.names if name in shown]
    images = [line for name in names for line in (f"![{name.replace('_', ' ')}]({name}.png)", "")]
    return [*section.before, *images, *section.behind] if names else []


def _prefix(number: int, panels: Sequence[Any]) -> str:
    return "" if len(panels) == 1 else f"{number + 1}_"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=]+", "-", name).strip("-")


def _drawings(folder: Path, prefix: str, results: Results) -> dict[str, Drawing]:
    """The figures of a panel, by the names of their files."""
    panel, told = results.panel, repr((results.averages, figures.by_domain(results)))
    hashes = {row.key: row_hash(row) for row in panel.all_rows()}
    found: dict[str, Drawing] = {}
    for corpus in panel.corpora() or [NO_CORPUS]:
        rows = [*filter(None, [panel.baseline]), *panel.of_corpus(corpus)]
        data = digest(corpus, told, [hashes[row.key] for row in rows])
        for name, draw in _OF_CORPUS.items():
            found[f"{prefix}{name}_{corpus}"] = Drawing(draw, (results, corpus), data)
        of_layers = digest(data, [layers.layers_of(folder, row) for row in rows])
        found[f"{prefix}layers_{corpus}"] = Drawing(layers.layer_figure, (folder, panel, corpus), of_layers)
    for method in _methods(results):
        rows = [*filter(None, [panel.baseline]), *(row for row in panel.rows if row.method == method)]
        data = digest(method, told, [hashes[row.key] for row in rows])
        found[f"{prefix}corpus_by_domain_{method}"] = Drawing(figures.corpus_by_domain, (results, method), data)
        kept = {(row.ratio, row.calibration): layers.kept_of(folder, row) for row in panel.rows if row.method == method}
        of_kept = digest(data, sorted(kept.items()))
        found[f"{prefix}corpus_transfer_{method}"] = Drawing(corpus_transfer, (results, method, kept), of_kept)
    if usage := _usage(panel):
        counts = [(source, [(layer, c.tolist()) for layer, c in of.items()]) for source, of in usage.items()]
        found[f"{prefix}expert_usage"] = Drawing(figures.expert_usage, (usage,), digest(counts))
    return {_file_name(name): one for name, one in found.items()}


def _sections(folder: Path, all_results: Sequence[Results]) -> tuple[list[str | Pictures], list[str]]:
    """The text behind the opening, and the tables for LaTeX."""
    text: list[str | Pictures] = []
    latex = []
    for number, results in enumerate(all_results):
        prefix, comparer = _prefix(number, all_results), Comparer()
        if len(all_results) > 1:
            text += [f"# {in_markdown(_panel_name(results.panel))}", ""]
        by_size = _BY_SIZE if results.panel.baseline is not None else _BY_SIZE.replace(_STAR, "")
        for corpus in results.panel.corpora() or [NO_CORPUS]:
            text += [f"## {in_markdown(_corpus_title(corpus))}", ""]
            scores, differences = main_table(results, corpus, comparer), difference_table(results, corpus)

            def picture(name: str, *note: str, of: str = corpus, start: str = prefix) -> Pictures:
                return Pictures((_file_name(f"{start}{name}_{of}"),), tuple(line for one in note for line in (one, "")))

            text += _tables([scores, differences])
            text += [picture("score_against_ratio"), picture("score_against_bytes", by_size)]
            text += _tables([domain_table(results, corpus, comparer)])
            text += _tables([generation_table(results, corpus), drift_table(results, corpus)])
            text.append(picture("drift_by_position", drift_figures.NOTE))
            text += _tables([calibration_table(results, corpus)])
            text.append(picture("reliability", RELIABILITY_NOTE))
            text += _tables([consistency_table(results, corpus)])
            text += _tables([recovery_table(results.panel, corpus)])
            text += _tables([layers.layer_table(folder, results.panel, corpus)])
            text.append(picture("layers", layers.FIGURE_NOTE))
            text += _tables([baseline_tests(results, corpus, comparer), best_tests(results, corpus, comparer)])
            latex += [to_latex(table) for table in (scores, differences) if table is not None]
        text += [_corpora_section(prefix, results), _transfer_section(prefix, results)]
        text += _tables([shift_table(results)], "## ")
        text += _tables([layers.overlap_table(folder, results.panel)], "## ")
        text += _usage_section(prefix, results.panel)
        text += _tables([published_table(results), cost_table(results.panel)], "## ")
    return text, latex


def _opening(panels: Sequence[Panel], failed: Sequence[str], damaged: Sequence[str]) -> str:
    cells = sum(len(row.records) for panel in panels for row in panel.rows)
    baselines = sum(panel.baseline is not None for panel in panels)
    names = "; ".join(dict.fromkeys(_panel_name(panel) for panel in panels))
    plural = "" if baselines == 1 else "s"
    text = f"Computed from the records of {cells} cells and {baselines} uncompressed baseline{plural}: {names}."
    for panel in panels:
        told = absent(panel) or elsewhere(panel)
        text += f" {_panel_name(panel)}: {told}" if told and len(panels) > 1 else f" {told}" if told else ""
    if failed:
        text += f" {len(failed)} cells of the last sweep failed and have no record: {'; '.join(failed)}."
    if damaged:
        text += f" Left out: {'; '.join(damaged)}."
    return text


def _panel_name(panel: Panel) -> str:
    return f"model {panel.model}, suite {panel.suite}, backend {panel.backend}"


def _corpus_title(corpus: str) -> str:
    return "Without calibration" if corpus == NO_CORPUS else f"Calibrated on {corpus}"


def _tables(tables: Sequence[Table | None], level: str = "### ") -> list[str]:
    return [
        line
        for table in tables
        if table is not None
        for line in (level + in_markdown(table.title), "", to_markdown(table))
    ]


def _methods(results: Results) -> list[str]:
    return sorted({row.method for row in results.panel.rows})


def _usage(panel: Panel) -> Usage:
    return collect_usage(record for row in panel.all_rows() for record in row.records)


def _corpora_section(prefix: str, results: Results) -> Pictures:
    alone = results.panel.baseline is None
    note = (
        "One figure a method: the calibration corpus down, the evaluation domain across, a row of blocks a "
        f"ratio; scores in percent (multiple choice for knowledge){_NO_MULTIPLES if alone else _MULTIPLES}; values and "
        "samples as in the tables."
    )
    names = tuple(_file_name(f"{prefix}corpus_by_domain_{method}") for method in _methods(results))
    return Pictures(names, (note, ""), ("## Calibration corpus and evaluation domain", ""))


def _transfer_section(prefix: str, results: Results) -> Pictures:
    names = tuple(_file_name(f"{prefix}corpus_transfer_{method}") for method in _methods(results))
    return Pictures(names, (TRANSFER_NOTE, ""), ("## What a corpus costs elsewhere, and what it keeps", ""))


def _usage_section(prefix: str, panel: Panel) -> list[str | Pictures]:
    usage = _usage(panel)
    if not usage:
        return []
    note = (
        "In the figure each expert's routed tokens are divided by the mean over the experts of its layer, so "
        "1 is balanced use; experts are in the same order in every source."
    )
    drawn = Pictures((_file_name(f"{prefix}expert_usage"),))
    return ["## Expert usage", "", drawn, note, "", to_markdown(usage_table(usage))]


if __name__ == "__main__":
    sys.exit(main())
