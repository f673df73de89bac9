"""Cells whose models are scored one decoder layer at a time, the uncompressed one too."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from harness.cells.run import run_cell
from harness.contracts.record import Record
from harness.errors import WinnowError
from harness.records.store import RecordStore
from tests.harness.cells.test_baseline import _logging_as_before  # noqa: F401
from tests.in_process import everything_here
from tests.tiny import save_tiny

WRITTEN = ("code", "math", "diversity", "writing")  # what the suite has beside choices and perplexity


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder, "olmoe")
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    everything_here(monkeypatch)


def run(model: Path, out: Path, *more: str, dropped: tuple[str, ...] = WRITTEN) -> Record:
    with initialize_config_module("conf", version_base="1.3"):
        words = [
            "model=local", f"model.path={model}", "method=random", "ratio=0.5", "suite=reference", "suite.items=6",
            *(f"~suite.tasks.{task}" for task in dropped), "backend=hf", f"output_dir={out}", "progress=false", *more,
        ]  # fmt: skip
        return run_cell(compose("config", words))


def test_choices_and_perplexity_are_those_of_the_whole_model(model: Path, tmp_path: Path) -> None:
    whole, streamed = run(model, tmp_path / "whole"), run(model, tmp_path / "out", "backend.stream=true")
    assert streamed.cell == whole.cell, "how much is read at once changes no number but by rounding"
    baselines = (RecordStore(tmp_path / out, "baseline").read(whole.cell["baseline"]) for out in ("out", "whole"))
    for ours, theirs in ((streamed, whole), tuple(baselines)):
        assert {score.task for score in ours.scores} == {"multiple_choice", "perplexity"}
        for found, expected in zip(ours.scores, theirs.scores, strict=True):
            assert (found.task, found.metric, found.part, found.n) == (
                expected.task, expected.metric, expected.part, expected.n
            )  # fmt: skip
            assert found.value == pytest.approx(expected.value, rel=1e-5)


def test_a_suite_that_writes_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"^[^\n]*backend.stream=true scores texts but writes none[^\n]*$"):
        run(model, tmp_path, "backend.stream=true", dropped=WRITTEN[:3])
