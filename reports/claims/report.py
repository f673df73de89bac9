"""The command ``winnow-report claims``: verdicts as a table, and as Markdown, CSV and JSON."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import WinnowError
from harness.files import write_files
from reports.claims import over_models
from reports.claims.tested import claims_of_folders
from reports.claims.written import as_csv, as_json, markdown, of_baselines, of_versions, plain, tally
from reports.page.embed import CLAIMS_FILE, PAGE, with_claims
from reports.tables.formats import format_list

_DESCRIPTION = """\
Tests the claims of the literature on the records in FOLDER: which hold, which are reversed, of which the effect is
negligible or smaller than said, which are undecided and how many more samples would tell, and which cells are missing.
Of several folders each claim is tested on the one that has most of what it needs. Prints a table and writes it, with
every number and the commands that would run what is missing, to FOLDER/report/claims.md, claims.csv and claims.json (of
several folders, to the first). Where winnow-report has written its page.html there, the page shows these verdicts from
then on.
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "winnow-report claims", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", metavar="FOLDER", type=Path, nargs="+", help="the output_dir of a sweep, e.g. results/claims"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="where to write, without suffix (default: FOLDER/report/claims)"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_claims(options.folders, options.output or options.folders[0] / "report" / "claims"))
    except WinnowError as error:
        print(f"winnow-report: error: {error}", file=sys.stderr)
        return 2
    return 0


def write_claims(folders: Sequence[Path], out: Path) -> str:
    """Writes ``out`` with the suffixes .md, .csv and .json; returns the table for the terminal.

    What is damaged is left out, and told. Raises WinnowError where a folder has no sound record, or ``out`` cannot be
    written.
    """
    found = claims_of_folders(folders)
    title = format_list([folder.resolve().name for folder in folders])
    contents = {"md": markdown(found, title), "csv": as_csv(found.findings), "json": as_json(found.findings)}
    files = {out.with_name(f"{out.name}.{suffix}"): text for suffix, text in contents.items()}
    page = out.with_name(PAGE)
    if out.with_suffix(".json").name == CLAIMS_FILE and page.is_file():
        files[page] = with_claims(page.read_text(encoding="utf-8"), contents["json"])
    write_files({path: text.encode() for path, text in files.items()})
    several = len(found.panels) > 1
    lines = [line for finding in found.findings for line in plain(finding, several)]
    lines += over_models.plain(over_models.over_models(found.findings))
    told = [*of_baselines(found.panels), *of_versions(found.panels), *(f"left out: {line}" for line in found.damaged)]
    return "\n".join([*lines, "", *told, tally(found.findings), f"written to {out}.md, .csv and .json"])
