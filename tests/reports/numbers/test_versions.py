"""What a report says where a folder holds results of several versions, and of sweeps that failed in part."""

from dataclasses import replace

from harness.records.store import RecordStore
from reports.cli import main
from reports.numbers.broken import failed_cells
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from reports.tables.scores import main_table
from tests.reports.synthetic import RIGHT, make_cell

VERSIONS = {"code": "1", "math": "1"}


def write(folder, method_version: str, task_versions: dict[str, str], **more) -> None:
    record, samples = make_cell("reap", 0.5, "code", 0, RIGHT["reap"][0.5])
    cell = record.cell | {"id": f"reap-{method_version}"}
    made = replace(record, cell=cell, method_version=method_version, task_versions=task_versions, **more)
    RecordStore(folder).write(made, samples)


def test_two_versions_are_two_rows_and_the_report_says_so(tmp_path):
    write(tmp_path, "1", VERSIONS)
    write(tmp_path, "2", VERSIONS | {"math": "3"})
    (panel,) = load_panels(tmp_path)
    assert sorted(row.method for row in panel.rows) == [
        "reap (version=1, version of math=1)", "reap (version=2, version of math=3)",
    ]  # fmt: skip
    assert main([str(tmp_path)]) == 0
    opening = (tmp_path / "report" / "report.md").read_text()
    assert "different versions stand side by side: method reap (1 and 2); task math (1 and 3)" in opening


def test_records_of_before_are_told_with_the_command_that_migrates_them(tmp_path):
    write(tmp_path, "1", VERSIONS)
    assert main([str(tmp_path)]) == 0
    opening = (tmp_path / "report" / "report.md").read_text()
    assert "migrate" not in opening and "side by side" not in opening
    write(tmp_path, "1", VERSIONS, version=1)
    assert main([str(tmp_path)]) == 0
    assert f"`winnow-report migrate {tmp_path}`" in (tmp_path / "report" / "report.md").read_text()


def test_migrate_is_a_command(tmp_path, capsys):
    assert main(["migrate", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("winnow-report: error: no records in")


def test_failures_are_those_of_the_last_sweep(tmp_path):
    assert failed_cells(tmp_path) == []
    for sweep, line in (("20260101-000000-a-1", "old"), ("20260102-000000-a-1", "new")):
        (tmp_path / "sweeps" / sweep / "failures").mkdir(parents=True)
        (tmp_path / "sweeps" / sweep / "failures" / "00001.txt").write_text(f"method={line}: it broke\n")
    assert failed_cells(tmp_path) == ["method=new: it broke"]


def test_a_table_that_mixes_engines_says_so(tmp_path):
    write(tmp_path, "1", VERSIONS, versions={"torch": "2.13", "transformers": "5"})
    (panel,) = load_panels(tmp_path)
    assert "different versions" not in main_table(evaluate(panel), "code").note
    write(tmp_path, "2", VERSIONS, versions={"torch": "2.14", "transformers": "5"})
    (panel,) = load_panels(tmp_path)
    assert "made with different versions: torch 2.13 and 2.14." in main_table(evaluate(panel), "code").note
