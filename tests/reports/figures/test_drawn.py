"""Figures are drawn in processes, again where their data have changed and else not, and are the same bytes as alone."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from harness.records.store import RecordStore
from reports.cli import write_report
from reports.figures import drawn as module
from reports.figures.drawn import FILE, Drawing, drawing
from reports.figures.scores import render, score_against_ratio
from reports.numbers.load import load_panels
from reports.numbers.measures import evaluate
from tests.reports.synthetic import RIGHT, make_cell, write_sweep


def figures(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The figures' content and when they were written."""
    paths = [path for path in folder.iterdir() if path.suffix in (".png", ".pdf")]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_sweep(tmp_path / "s", ("mixed", "code"), samples=False, methods=("reap", "hc_smoe"))
    return tmp_path / "s"


def changed(before: dict[str, tuple[bytes, int]], after: dict[str, tuple[bytes, int]]) -> set[str]:
    return {name.rpartition(".")[0] for name in after if before.get(name) != after[name]}


def test_figures_are_the_bytes_that_are_drawn_without_processes(sweep, tmp_path, monkeypatch):
    write_report(sweep, tmp_path / "many")
    monkeypatch.setattr(module.sys, "platform", "win32")
    write_report(sweep, tmp_path / "one")
    many, one = figures(tmp_path / "many"), figures(tmp_path / "one")
    assert {name: content for name, (content, _) in many.items()} == {n: content for n, (content, _) in one.items()}
    assert {"score_against_ratio_mixed.png", "corpus_by_domain_reap.pdf", "expert_usage.png"} <= many.keys()
    assert (tmp_path / "many" / "report.md").read_bytes() == (tmp_path / "one" / "report.md").read_bytes()
    (panel,) = load_panels(sweep)
    alone = score_against_ratio(evaluate(panel), "mixed")
    assert alone is not None and many["score_against_ratio_mixed.png"][0] == render(alone, "png")


def test_only_what_has_changed_is_drawn_again(sweep, tmp_path):
    out = tmp_path / "out"
    text = write_report(sweep, out).read_text()
    first = figures(out)
    assert write_report(sweep, out).read_text() == text and figures(out) == first
    store = RecordStore(sweep)
    record, samples = make_cell("reap", 0.5, "code", 0, RIGHT["reap"][0.25])
    store.write(record, samples)
    second = figures(out) if write_report(sweep, out) else {}
    assert changed(first, second) == {"score_against_ratio_code", "corpus_by_domain_reap"}
    fresh = tmp_path / "fresh"
    write_report(sweep, fresh)
    assert {name: one for name, (one, _) in second.items()} == {name: one for name, (one, _) in figures(fresh).items()}


def test_what_is_not_drawn_does_not_matter_and_a_new_seed_does(sweep, tmp_path):
    out = tmp_path / "out"
    write_report(sweep, out)
    first, store = figures(out), RecordStore(sweep)
    name = next(name for name in store.ids() if "__reap__0.5__code" in name)
    store.write(replace(store.read(name), timings={"evaluation": 99.0}), [])
    write_report(sweep, out)
    assert figures(out) == first and "99.0" in (out / "report.md").read_text()
    store.write(*make_cell("reap", 0.5, "code", 1, RIGHT["reap"][0.5]))
    write_report(sweep, out)
    assert changed(first, figures(out)) == {"score_against_ratio_code", "corpus_by_domain_reap"}


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "no notes", "damaged notes", "other code"])
def test_files_that_are_not_what_was_written_are_drawn_again(sweep, tmp_path, damage, monkeypatch):
    out = tmp_path / "out"
    write_report(sweep, out)
    first, path = figures(out), out / "expert_usage.pdf"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "gone":
        path.unlink()
    elif damage == "other":
        path.write_bytes((out / "corpus_by_domain_reap.pdf").read_bytes())
    elif damage == "no notes":
        (out / FILE).unlink()
    elif damage == "damaged notes":
        (out / FILE).write_text('{"expert_usage": 3}')
    else:
        monkeypatch.setattr(module, "_code", lambda: "other")
    write_report(sweep, out)
    again = {"expert_usage"} if damage in ("cut", "gone", "other") else {name.rpartition(".")[0] for name in first}
    assert changed(first, figures(out)) == again
    assert {name: one for name, (one, _) in figures(out).items()} == {name: one for name, (one, _) in first.items()}


def test_figures_that_show_nothing_are_not_tried_again(sweep, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_report(sweep, out)
    notes = json.loads((out / FILE).read_text())
    assert notes["reliability_code"]["files"] == {} and not (out / "reliability_code.png").exists()
    monkeypatch.setattr(module, "_files", lambda one: pytest.fail("nothing has changed"))
    write_report(sweep, out)


def draw(results: object, name: str) -> object:
    """For the next tests: of a process that dies, fails, or draws."""
    if os.getpid() != PARENT and name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "fails":
        raise ValueError("cannot be drawn")
    return score_against_ratio(results, name if name in ("mixed", "code") else "mixed")


PARENT = os.getpid()


def test_what_a_killed_process_did_not_finish_is_drawn_here(sweep, tmp_path):
    (panel,) = load_panels(sweep)
    results = evaluate(panel)
    drawings = {name: Drawing(draw, (results, name), name) for name in ("killed", "mixed", "code", "more")}
    with drawing(drawings, tmp_path) as finished:
        found = finished()
    assert found.shown == drawings.keys() and len(found.contents) == 2 * len(drawings) + 1
    alone = score_against_ratio(results, "mixed")
    assert alone is not None and found.contents[tmp_path / "killed.png"] == render(alone, "png")


def test_a_figure_that_cannot_be_drawn_is_told_once_and_no_process_is_left(sweep, tmp_path, capfd):
    (panel,) = load_panels(sweep)
    results = evaluate(panel)
    drawings = {name: Drawing(draw, (results, name), name) for name in ("mixed", "fails", "code")}
    with pytest.raises(ValueError, match="cannot be drawn"), drawing(drawings, tmp_path) as finished:
        finished()
    assert not list(tmp_path.glob("*.png")) and "Traceback" not in capfd.readouterr().err
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    with drawing(drawings, tmp_path):
        pass  # left before they have finished
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() == children
