import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records.store import RecordStore
from reports.cli import main
from tests.reports.synthetic import RIGHT, make_cell, write_sweep

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
from reports.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_without_torch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_the_refusal_of_torch_works():
    code = WITHOUT_TORCH.replace("from reports.cli import main", "import torch")
    assert (
        "torch is not installed here"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stderr
    )


def test_report_is_written_without_torch(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    run = run_without_torch(str(folder))
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"report written to {folder / 'report' / 'report.md'}\n"
    written = {path.name for path in (folder / "report").iterdir()}
    figures = {f"{name}.{kind}" for name in ("expert_usage", "score_against_ratio_mixed") for kind in ("png", "pdf")}
    assert written == {".figures.json", "report.md", "page.html", "table.csv", "table.tex"} | figures
    text = (folder / "report" / "report.md").read_text()
    for title in (
        "### Scores\n",
        "### Differences from the baseline",
        "### Scores by domain",
        "## Expert usage",
        "## Sizes and timings",
    ):
        assert title in text
    assert "records of 12 cells and 1 uncompressed baseline:" in text
    for name in figures:
        assert name.endswith(".pdf") or f"]({name})" in text


def test_several_corpora_have_sections_and_figures(tmp_path):
    write_sweep(tmp_path / "s", ("mixed", "code"), samples=False, methods=("hc_smoe",))
    assert main([str(tmp_path / "s"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Calibrated on code" in text and "## Calibrated on mixed" in text
    assert (tmp_path / "out" / "corpus_by_domain_hc_smoe.png").exists()
    assert "(corpus_by_domain_hc_smoe.png)" in text
    assert not (tmp_path / "s" / "report").exists()
    assert (tmp_path / "out" / "table.tex").read_text().count(r"\begin{table}") == 4


def test_no_baseline_is_said(tmp_path):
    RecordStore(tmp_path).write(*make_cell("reap", 0.25, "a/b: c", 0, RIGHT["reap"][0.25]))
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "no differences are shown" in text and "### Differences" not in text
    assert (tmp_path / "report" / "score_against_ratio_a-b-c.png").exists()


@pytest.mark.parametrize("case", ["no folder", "no records", "damaged", "not writable"])
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, case):
    folder = tmp_path / "sweep"
    if case != "no folder":
        folder.mkdir()
    if case in ("damaged", "not writable"):
        store = RecordStore(folder)
        store.write(*make_cell("reap", 0.25, "code", 0, RIGHT["reap"][0.25]))
        if case == "damaged":
            store.path(store.ids()[0]).write_text("{")
        else:
            (folder / "report").write_text("a file where the folder should be")
    assert main([str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("winnow-report: error: ") and output.err.count("\n") == 1
    assert not (folder / "report").is_dir()


def test_help_says_what_is_read_and_written(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("FOLDER", "--out", "report.md", "table.csv", "table.tex", "baseline"):
        assert word in text
