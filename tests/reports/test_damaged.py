"""A damaged file is named in one line, and the rest of the report goes on (``tests.attack.damaged`` has all kinds)."""

import json
import shutil
from pathlib import Path

import pytest

from harness.records.store import RecordStore
from reports import cli
from reports.figures import scores as figures
from reports.numbers.load import load_panels, load_sound
from tests.attack.damaged import ALL, Damaged, is_clear, run, sound
from tests.reports.synthetic import RIGHT, make_cell


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "render", lambda figure, kind: b"")


def test_there_are_sixty_kinds() -> None:
    assert len({one.name for one in ALL}) == len(ALL) >= 60


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_claims_go_on(one: Damaged, tmp_path: Path) -> None:
    ending = run(one, tmp_path, "claims")
    assert is_clear(one, ending, tmp_path, "claims.md"), ending


REPORTED = [
    one for one in ALL if one.name.endswith((": empty", ": a folder", "is text", "a column lacks", "are a list"))
]


@pytest.mark.parametrize("one", REPORTED, ids=lambda one: one.name)
def test_the_report_goes_on(one: Damaged, tmp_path: Path) -> None:
    ending = run(one, tmp_path)
    assert is_clear(one, ending, tmp_path, "report.md"), ending


def test_what_is_sound_is_reported_as_if_it_were_alone(tmp_path: Path) -> None:
    store, whole = RecordStore(tmp_path), tmp_path / "whole"
    for method in ("reap", "frequency"):
        store.write(*make_cell(method, 0.25, "code", 0, RIGHT[method][0.25]))
    bad, good = store.ids()
    shutil.copytree(tmp_path / "records", whole / "records")
    store.path(bad).write_text("{")
    (whole / "records" / f"{bad}.json").unlink()
    panels, damaged = load_sound(tmp_path)
    assert [r.cell["id"] for panel in panels for r in panel.records()] == [good] and len(damaged) == 1
    assert cli.main([str(tmp_path)]) == cli.main([str(whole)]) == 0
    assert (tmp_path / "report" / "table.csv").read_text() == (whole / "report" / "table.csv").read_text()


def test_a_sound_folder_leaves_nothing_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(sound(tmp_path))]) == 0
    assert "left out" not in capsys.readouterr().err
    assert "Left out" not in (tmp_path / "report" / "report.md").read_text()


def test_nothing_sound_is_an_error_that_names_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_text("[]")
    assert cli.main([str(tmp_path)]) == cli.main(["claims", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("a.json" in line and "it holds no JSON object" in line for line in lines)


def test_failures_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    note = min(sound(tmp_path).glob("sweeps/*/failures/*.txt"))
    note.write_bytes(b"\xff\xfe broke")
    (note.parent / "00001.txt").mkdir()
    assert cli.main([str(tmp_path)]) == 0
    assert "2 cells of the last sweep failed" in (tmp_path / "report" / "report.md").read_text()


def test_shown_records_are_whole() -> None:
    shown = Path(__file__).resolve().parents[2] / "results"
    for folder in sorted(path.parent for path in shown.glob("*/records")):
        assert load_panels(folder), folder
        for kind in ("records", "baseline"):
            for path in (folder / kind).glob("*.json"):
                assert json.loads(path.read_text())["cell"]["id"] == path.stem


def test_the_plan_of_a_single_cell_is_told_too(tmp_path: Path) -> None:
    (sound(tmp_path) / "plan.json").write_text("[]")
    assert cli.main([str(tmp_path)]) == 0
    assert f"{tmp_path / 'plan.json'} is damaged" in (tmp_path / "report" / "report.md").read_text()
