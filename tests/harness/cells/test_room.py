"""``keep_checkpoint=auto``: checkpoints go when their cell is scored, where the disk would not hold those to come."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.cells import room
from harness.cells.room import keeps_checkpoint
from tests.harness.test_cli import _logging_as_before, corpus, local, model, winnow  # noqa: F401


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(room, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=free)))


@pytest.mark.parametrize("left, free, stays", [(3, 300, True), (3, 299, False), (0, 0, True)])
def test_it_stays_where_there_is_room_for_those_to_come(
    left: int, free: int, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    disk(monkeypatch, free)
    monkeypatch.setenv(room.CELLS_LEFT, str(left))
    assert keeps_checkpoint("auto", tmp_path, tmp_path) is stays
    assert keeps_checkpoint(True, tmp_path, tmp_path) is True
    assert keeps_checkpoint(False, tmp_path, tmp_path) is False


@pytest.mark.parametrize("room_for", [2, 1, 0])
def test_a_sweep_keeps_what_the_disk_holds(
    room_for: int,
    model: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three cells one after the other: the first has two to come, the last none."""
    whole = (model / "model.safetensors").stat().st_size
    disk(monkeypatch, room_for * whole)
    assert winnow(monkeypatch, "-m", *local(model, corpus, tmp_path / "out", "ratio=0.25,0.5,0.625")) == 0
    kept = {path.parent.name.split("__")[2] for path in (tmp_path / "out" / "cells").glob("*/checkpoint")}
    assert kept == {2: {"0.25", "0.5", "0.625"}, 1: {"0.5", "0.625"}, 0: {"0.625"}}[room_for]
