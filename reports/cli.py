"""The command ``winnow-report``: from a folder of records to tables, figures and a page of Markdown."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import WinnowError
from harness.store import write_files
from reports import figures
from reports.formats import Table, to_latex, to_markdown
from reports.load import NO_CORPUS, Panel, load_panels
from reports.measures import Results, evaluate
from reports.tables import (
    cost_table,
    difference_table,
    domain_table,
    main_table,
    to_csv,
    usage_table,
)
from reports.usage import Usage, collect_usage

_DESCRIPTION = """\
Reads FOLDER/records and FOLDER/baseline, as `winnow output_dir=FOLDER ...` leaves them, and writes
  report.md   every table and figure, each with a sentence on how it was computed
  table.csv   the main table and its differences from the baseline as plain numbers (shares from 0 to 1)
  table.tex   the main table and its differences for LaTeX (needs the packages booktabs and graphicx)
  *.png, *.pdf  the figures

It can be run while a sweep is still at work: it shows the cells that are finished. Differences from the
baseline are paired item by item where the .parquet files lie beside the records, else unpaired.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "winnow-report", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output_dir of a sweep, e.g. results/demo")
    parser.add_argument("--out", metavar="DIR", type=Path, default=None, help="where to write (default: FOLDER/report)")
    options = parser.parse_args(arguments)
    try:
        report = write_report(options.folder, options.out or options.folder / "report")
    except WinnowError as error:
        print(f"winnow-report: error: {error}", file=sys.stderr)
        return 2
    print(f"report written to {report}")
    return 0


def write_report(folder: Path, out: Path) -> Path:
    """Writes the report and returns the path of report.md.

    Raises WinnowError where there are no records, one is damaged, or ``out`` cannot be written.
    """
    panels = load_panels(folder)
    contents: dict[Path, bytes] = {}
    text = [f"# {folder.resolve().name}", "", _opening(panels), ""]
    latex = []
    all_results = [evaluate(panel) for panel in panels]
    for number, results in enumerate(all_results):
        prefix = "" if len(panels) == 1 else f"{number + 1}_"
        if len(panels) > 1:
            text += [f"# {_panel_name(results.panel)}", ""]
        for corpus in results.panel.corpora() or [NO_CORPUS]:
            text += [f"## {_corpus_title(corpus)}", ""]
            scores, differences = main_table(results, corpus), difference_table(results, corpus)
            text += _tables([scores, differences])
            text += _figure(
                contents,
                out,
                f"{prefix}score_against_ratio_{corpus}",
                figures.score_against_ratio(results, corpus),
            )
            text += _tables([domain_table(results, corpus)])
            latex += [to_latex(table) for table in (scores, differences) if table is not None]
        text += _corpora_section(contents, out, prefix, results)
        text += _usage_section(contents, out, prefix, results.panel)
        text += _tables([cost_table(results.panel)], "## ")
    contents[out / "table.csv"] = to_csv(all_results).encode()
    contents[out / "table.tex"] = "\n".join(latex).encode()
    contents[out / "report.md"] = "\n".join(text).encode()
    write_files(contents)
    return out / "report.md"


def _opening(panels: Sequence[Panel]) -> str:
    cells = sum(len(row.records) for panel in panels for row in panel.rows)
    baselines = sum(panel.baseline is not None for panel in panels)
    names = "; ".join(dict.fromkeys(_panel_name(panel) for panel in panels))
    plural = "" if baselines == 1 else "s"
    text = f"Computed from the records of {cells} cells and {baselines} uncompressed baseline{plural}: {names}."
    if baselines < len(panels):
        text += " Where there is no baseline, no differences are shown."
    return text


def _panel_name(panel: Panel) -> str:
    return f"model {panel.model}, suite {panel.suite}, backend {panel.backend}"


def _corpus_title(corpus: str) -> str:
    return "Without calibration" if corpus == NO_CORPUS else f"Calibrated on {corpus}"


def _tables(tables: Sequence[Table | None], level: str = "### ") -> list[str]:
    return [line for table in tables if table is not None for line in (level + table.title, "", to_markdown(table))]


def _figure(contents: dict[Path, bytes], out: Path, name: str, figure: figures.Figure | None) -> list[str]:
    if figure is None:
        return []
    name = re.sub(r"[^A-Za-z0-9._=]+", "-", name).strip("-")
    for kind in ("png", "pdf"):
        contents[out / f"{name}.{kind}"] = figures.render(figure, kind)
    return [f"![{name.replace('_', ' ')}]({name}.png)", ""]


def _corpora_section(contents: dict[Path, bytes], out: Path, prefix: str, results: Results) -> list[str]:
    lines: list[str] = []
    for method in sorted({row.method for row in results.panel.rows}):
        drawn = figures.corpus_by_domain(results, method)
        lines += _figure(contents, out, f"{prefix}corpus_by_domain_{method}", drawn)
    if not lines:
        return []
    note = (
        "One figure a method: the calibration corpus down, the evaluation domain across, a row of blocks a "
        "ratio; scores in percent (multiple choice for knowledge) and perplexity as a multiple of the "
        "baseline's; values and samples as in the tables."
    )
    return ["## Calibration corpus and evaluation domain", "", *lines, note, ""]


def _usage_section(contents: dict[Path, bytes], out: Path, prefix: str, panel: Panel) -> list[str]:
    usage: Usage = collect_usage(record for row in panel.all_rows() for record in row.records)
    if not usage:
        return []
    table = usage_table(usage)
    note = (
        "In the figure each expert's routed tokens are divided by the mean over the experts of its layer, so "
        "1 is balanced use; experts are in the same order in every source."
    )
    drawn = _figure(contents, out, f"{prefix}expert_usage", figures.expert_usage(usage))
    return ["## Expert usage", "", *drawn, note, "", to_markdown(table)]


if __name__ == "__main__":
    sys.exit(main())
