"""The command ``winnow-report claims``: verdicts as a table, and as Markdown, CSV and JSON."""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.errors import WinnowError
from harness.files import write_files
from reports.claims.evaluate import (
    BROKEN,
    FAILS,
    HOLDS,
    NOT_MEASURED,
    NOT_RUN,
    NOT_TESTED,
    UNDECIDED,
    Evidence,
    Finding,
    evaluate_claims,
)
from reports.claims.list import CLAIMS, MEASURES
from reports.claims.selection import commands
from reports.numbers.baselines import absent, elsewhere
from reports.numbers.broken import failed_cells, faults
from reports.numbers.detail_samples import with_detail_samples
from reports.numbers.layer_samples import with_layer_samples
from reports.numbers.load import Panel, Row, load_sound
from reports.numbers.paired import ALPHA
from reports.page.embed import CLAIMS_FILE, PAGE, with_claims
from reports.tables.comparisons import p_text
from reports.tables.formats import Table, in_csv, in_markdown, to_markdown

_DESCRIPTION = """\
Tests the claims of the literature on the records in FOLDER: which hold, which do not, which are undecided and how many
more samples would tell, and which cells are missing. Prints a table and writes it, with every number and the commands
that would run what is missing, to FOLDER/report/claims.md, claims.csv and claims.json. Where winnow-report has written
its page.html there, the page shows these verdicts from then on.
"""
_RULES = """\
Every contrast is taken over the items that all its cells answered, tasks by themselves; one yes-or-no score of two
single cells by McNemar's exact test, everything else by Student's t with the squared standard errors of items and of
seeds added up. A claim of several contrasts holds if all of them do. p is two-sided and corrected by Holm's rule over
the {tested} claims that were tested by one; below 0.05 a claim holds or does not hold, else it is undecided, with the
number of items at which an effect of the size seen would be found with 80 % power at the level of a single claim
({level:.2g}). Layers are no sample of anything: what each has is averaged over them and tested on the parts of the
calibration tokens (jackknife) or the groups of merged experts behind it, and on the layers themselves only where
neither is known; ranks over cells and layers are tested by permuting whole cells and whole layers. Intervals are 95 %,
of single contrasts. "seeds 1/3" counts the seeds of each cell: what chance does to a cell of a single seed is not in
its interval. The verdicts are about the model and the settings below, no others."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "winnow-report claims", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output_dir of a sweep, e.g. results/claims")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="where to write, without suffix (default: FOLDER/report/claims)"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_claims(options.folder, options.output or options.folder / "report" / "claims"))
    except WinnowError as error:
        print(f"winnow-report: error: {error}", file=sys.stderr)
        return 2
    return 0


def write_claims(folder: Path, out: Path) -> str:
    """Writes ``out`` with the suffixes .md, .csv and .json; returns the table for the terminal.

    What is damaged is left out, and told. Raises WinnowError where there is no sound record, or ``out`` cannot be
    written.
    """
    sound, damaged = load_sound(folder)
    panels = [with_detail_samples(folder, with_layer_samples(folder, panel)) for panel in sound]
    findings = evaluate_claims(CLAIMS, panels, MEASURES)
    several = len(panels) > 1
    contents = {
        "md": _markdown(findings, panels, folder, damaged),
        "csv": _csv(findings, folder),
        "json": json.dumps([_as_json(one, folder) for one in findings], indent=1, ensure_ascii=False) + "\n",
    }
    files = {out.with_name(f"{out.name}.{suffix}"): text for suffix, text in contents.items()}
    page = out.with_name(PAGE)
    if out.with_suffix(".json").name == CLAIMS_FILE and page.is_file():
        files[page] = with_claims(page.read_text(encoding="utf-8"), contents["json"])
    write_files({path: text.encode() for path, text in files.items()})
    lines = [line for finding in findings for line in _plain(finding, folder, several)]
    left_out = [*_of_baselines(panels), *(f"left out: {line}" for line in damaged)]
    return "\n".join([*lines, "", *left_out, _tally(findings), f"written to {out}.md, .csv and .json"])


def _tally(findings: Sequence[Finding]) -> str:
    counts = {v: sum(f.verdict == v for f in findings) for v in (HOLDS, FAILS, UNDECIDED, NOT_TESTED)}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _plain(finding: Finding, folder: Path, several: bool) -> list[str]:
    where = f" [{_panel_name(finding.panel)}]" if several else ""
    p = "" if finding.corrected is None else f"  ({p_text(finding.corrected)})"
    lines = [f"{finding.verdict.upper():13} {finding.claim.id}{where}{p}", f"    {finding.claim.says}"]
    lines += [f"    {line}" for line in _seen(finding)]
    return lines + [f"    $ {command}" for command in _commands(finding, folder)]


def _commands(finding: Finding, folder: Path) -> list[str]:
    claim, panel = finding.claim, finding.panel
    if not finding.missing:
        return []
    if claim.suite and claim.suite != panel.suite:
        # Another suite has records of its own: all cells of the claim have to be run in it.
        return commands(claim.cells(), panel, claim.suite, folder, claim.also)
    # A cell that has its record is not run again, unless for what another setting adds to it.
    lacking = [one for one in finding.missing if one.why == NOT_RUN or one.why.startswith(NOT_MEASURED)]
    cells = [one.cell for one in finding.missing if one in lacking or claim.also and BROKEN not in one.why]
    return commands(list(dict.fromkeys(cells)), panel, "", folder, claim.also)


def _of_baselines(panels: Sequence[Panel]) -> list[str]:
    """A sentence for each panel whose uncompressed model has no record, or one from elsewhere."""
    return [f"{_panel_name(panel)}: {told}" for panel in panels if (told := absent(panel) or elsewhere(panel))]


def _panel_name(panel: Panel) -> str:
    return f"model {panel.model}, suite {panel.suite}, backend {panel.backend}"


def _markdown(findings: Sequence[Finding], panels: Sequence[Panel], folder: Path, damaged: Sequence[str]) -> str:
    several = len(panels) > 1
    tested = sum(finding.p is not None for finding in findings)
    body = [
        [
            f"{finding.claim.says} ({finding.claim.source})",
            finding.verdict,
            "" if finding.corrected is None else p_text(finding.corrected),
            "; ".join(_seen(finding)) + (f" [{_panel_name(finding.panel)}]" if several else ""),
        ]
        for finding in findings
    ]
    rules = _RULES.format(tested=tested, level=ALPHA / max(1, tested)).replace("\n", " ")
    names = dict.fromkeys(in_markdown(_panel_name(panel)) for panel in panels)
    lines = [f"# Claims, tested on {in_markdown(folder.resolve().name)}", "", *names, ""]
    lines += [_tally(findings) + ".", ""]
    lines += [text for told in _of_baselines(panels) for text in (in_markdown(told), "")]
    lines += _section("Left out", [f"- {in_markdown(line)}" for line in damaged])
    lines += [to_markdown(Table("Claims", ["claim", "verdict", "p", "what was seen"], body, rules))]
    lines += _section("Missing cells", [line for f in findings for line in _lacking(f, folder)])
    told = [
        in_markdown(f"- {row.label}, ratio {row.ratio:g}, {row.calibration}: {fault}") for row, fault in _broken(panels)
    ]
    lines += _section("Broken cells", told)
    lines += _section(
        "Cells of the last sweep that failed", [f"- {in_markdown(line)}" for line in failed_cells(folder)]
    )
    return "\n".join(lines)


def _seen(finding: Finding) -> list[str]:
    more = [f"undecided: {finding.more}"] if finding.more else []
    return [one.text for one in finding.evidence] + more + [f"{one.cell}: {one.why}" for one in finding.missing]


def _lacking(finding: Finding, folder: Path) -> list[str]:
    found = _commands(finding, folder)
    return [f"- {finding.claim.id}:", "", *(f"      {command}" for command in found), ""] if found else []


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _broken(panels: Sequence[Panel]) -> list[tuple[Row, str]]:
    return [
        (row, fault)
        for panel in panels
        for row in panel.all_rows()
        for record in row.records
        for fault in faults(record)
    ]


def _csv(findings: Sequence[Finding], folder: Path) -> str:
    """One line a contrast; a claim without any has one line."""
    out = io.StringIO()
    names = ("effect", "low", "high", "error", "n", "paired")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["claim", "verdict", "p", "p_corrected", "model", "suite", "backend"]
        + ["contrast", "kind", "threshold", *names, "seeds", "p_above", "p_below", "missing", "commands"]
    )
    for finding in findings:
        panel = finding.panel
        start = [finding.claim.id, finding.verdict, _cell(finding.p), _cell(finding.corrected)]
        start += [in_csv(name) for name in (panel.model, panel.suite, panel.backend)]
        end = ["; ".join(f"{m.cell}: {m.why}" for m in finding.missing), "; ".join(_commands(finding, folder))]
        contrasts: list[Evidence | None] = [*finding.evidence] or [None]
        for one in contrasts:
            middle = ["", "", ""] if one is None else [in_csv(one.name), one.kind, _cell(one.threshold)]
            numbers = [""] * (len(names) + 3)
            if one is not None and one.comparison is not None:
                c = one.comparison
                numbers = [_cell(getattr(c, name)) for name in names] + ["/".join(map(str, c.seeds))]
                numbers += [_cell(c.p_above(one.threshold)), _cell(c.p_below(one.threshold))]
            writer.writerow(start + middle + numbers + end)
    return out.getvalue()


def _cell(value: float | bool | None) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _as_json(finding: Finding, folder: Path) -> dict[str, Any]:
    panel = finding.panel
    return {
        "id": finding.claim.id,
        "says": finding.claim.says,
        "source": finding.claim.source,
        "verdict": finding.verdict,
        "p": finding.p,
        "p_corrected": finding.corrected,
        "model": panel.model,
        "suite": panel.suite,
        "backend": panel.backend,
        "evidence": [_evidence_as_json(one) for one in finding.evidence],
        "more": finding.more,
        "missing": [{"cell": str(one.cell), "why": one.why} for one in finding.missing],
        "commands": _commands(finding, folder),
    }


def _evidence_as_json(one: Evidence) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": one.name, "kind": one.kind, "threshold": one.threshold, "text": one.text}
    if one.comparison is None:
        return shown
    numbers = asdict(one.comparison)
    tails = {"p_above": one.comparison.p_above(one.threshold), "p_below": one.comparison.p_below(one.threshold)}
    return shown | {name: _finite(value) for name, value in (numbers | tails).items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
