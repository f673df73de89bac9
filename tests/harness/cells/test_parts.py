"""``calibration.shards``: parts of a corpus calibrated by commands of their own, and a cell that merges them."""

import json
from pathlib import Path

import pytest

from tests.harness.test_cli import _logging_as_before, corpus, local, model, winnow  # noqa: F401

THREE = ("method=reap,hc_smoe", "ratio=0.5", "calibration.batch_size=2", "calibration.shards=3")


@pytest.fixture
def long_corpus(tmp_path: Path) -> Path:
    path = tmp_path / "long.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Tom has {n} apples and buys {n + 4} more."}) + "\n" for n in range(9))
    )
    return path


def test_parts_and_their_merge_give_the_plans_of_one_pass(
    model: Path,  # noqa: F811
    long_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert winnow(monkeypatch, "-m", *local(model, long_corpus, parts, *THREE, "calibration.shard=0,2")) == 0
    files = sorted(path.name for path in (parts / "calibration").rglob("*-of-3.npz"))
    assert files == ["0-of-3.npz", "2-of-3.npz"] and not (parts / "records").exists()
    one = [word.replace("method=reap,hc_smoe", "method=hc_smoe") for word in THREE]
    assert winnow(monkeypatch, *local(model, long_corpus, parts, *one, "calibration.shard=1")) == 0
    assert "1-of-3.npz" in capfd.readouterr().out
    # That command asked for what one method needs: a single cell of the other cannot merge it, a sweep makes it again.
    other = [word.replace("method=reap,hc_smoe", "method=reap") for word in THREE]
    assert winnow(monkeypatch, *local(model, long_corpus, parts, *other)) == 2
    assert "without" in capfd.readouterr().err
    assert winnow(monkeypatch, "-m", *local(model, long_corpus, parts, *THREE)) == 0
    assert winnow(monkeypatch, "-m", *local(model, long_corpus, whole, *THREE[:3])) == 0
    plans = {path.relative_to(parts): path.read_text() for path in parts.glob("cells/*/plan.json")}
    assert len(plans) == 2
    for path, plan in plans.items():
        assert json.loads(plan) == json.loads((whole / path).read_text())  # and so the cells have the same ids


def test_what_cannot_be(
    model: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for words, said in (
        (["calibration.shard=1"], "Set calibration.shards"),
        (["calibration.shards=2", "calibration.shard=2"], "count from 0 to 1"),
        (["calibration.shards=2", "calibration.shard=0", "method=random"], "reads no statistics"),
    ):
        assert winnow(monkeypatch, *local(model, corpus, tmp_path / "out", *words)) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("winnow:")]
        assert len(lines) == 1 and said in lines[0]
