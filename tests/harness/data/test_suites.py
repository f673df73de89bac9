"""The suites of the papers: their composition, missing data, and a cell of suite=quick with no network."""

import socket
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.cells.cell import prepare
from harness.cells.run import run_cell
from harness.data.schema import DATA_SETS
from harness.data.sets import NotStaged
from harness.data.suites import with_data
from harness.errors import WinnowError
from tests.in_process import everything_here
from tests.tasks.published.test_benchmark_code import ADD, DOUBLE
from tests.tasks.published.test_benchmark_math import APPLES
from tests.tasks.staged import stage
from tests.tiny import save_tiny

CONF = Path(__file__).parents[3] / "conf"
CODE, MATH = ["humaneval", "humaneval_plus", "mbpp", "mbpp_plus"], ["gsm8k", "math_500"]
CHOICE = ["winogrande", "arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte"]
TEXT = ["wikitext", "c4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    save_tiny(folder / "model", "qwen3_moe")
    for name, rows in (("humaneval", [DOUBLE]), ("mbpp", [ADD]), ("gsm8k", [APPLES, APPLES | {"id": "1"}])):
        stage(folder / "data", name, rows)
    question = {"contexts": ["Is it?\nAnswer:"], "choices": ["no", "yes"], "answer": 1, "group": ""}
    stage(folder / "data", "boolq", [question | {"id": str(i)} for i in range(3)])
    stage(folder / "data", "writingbench", [{"id": "0", "prompt": "Write.", "checklist": []}])
    return folder


def config(folder: Path, *overrides: str, root: str | None = None) -> DictConfig:
    chosen = [
        "model=local", f"model.path={folder / 'model'}", "method=none", "ratio=0", "backend=hf", "progress=false",
        f"output_dir={folder / 'out'}", f"data.root={root or folder / 'data'}", *overrides,
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=chosen)


@pytest.mark.parametrize(
    ("suite", "tasks"),
    [("paper_code", CODE), ("paper_math", MATH), ("paper_mc", CHOICE), ("paper_ppl", TEXT),
     ("livecodebench", ["livecodebench"]),
     ("paper", [*CODE, *MATH, *CHOICE, *TEXT]), ("quick", [*CODE, *MATH, *CHOICE, *TEXT])],
)  # fmt: skip
def test_every_suite_names_its_benchmarks(folder: Path, suite: str, tasks: list[str]) -> None:
    node: Any = OmegaConf.to_container(config(folder, f"suite={suite}").suite, resolve=True)
    own = {name: node["tasks"][name] for name in tasks}
    assert node["name"] == suite and set(node["tasks"]) - set(tasks) <= {"wildbench", "writingbench", "diversity"}
    assert node["items"] == (100 if suite == "quick" else None)
    assert node["missing"] == ("skip" if suite == "quick" else "error")
    for name, task in own.items():
        made = instantiate(task, _convert_="all")
        assert (made.name, made.items, made.root) == (name, node["items"], str(folder / "data"))
        assert made.data_set in DATA_SETS


def test_missing_data_is_an_error_that_names_it_all_or_is_left_out_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        NotStaged, match=r"humaneval_plus, mbpp_plus: run winnow-data stage --only humaneval_plus mbpp_plus --to"
    ):
        prepare(config(folder, "suite=paper_code"))
    cell = prepare(config(folder, "suite=paper_code", "suite.missing=skip"))
    assert list(cell.config["suite"]["tasks"]) == ["humaneval", "mbpp"]
    assert cell.config["suite"]["left_out"] == ["humaneval_plus", "mbpp_plus"]
    assert "left out" in caplog.text and "humaneval_plus, mbpp_plus" in caplog.text
    with pytest.raises(NotStaged, match="no task of suite=paper_ppl"):
        prepare(config(folder, "suite=paper_ppl", "suite.missing=skip"))
    with pytest.raises(WinnowError, match="suite.missing=maybe: should be 'error' or 'skip'"):
        prepare(config(folder, "suite=paper_ppl", "suite.missing=maybe"))


def test_tasks_without_a_root_stay() -> None:
    suite = {"name": "s", "tasks": {"hub": {"data_set": "c4", "root": None}, "made": {"items": 3}}}
    assert with_data(suite) is suite


def test_a_cell_is_the_same_wherever_its_data_lie_and_another_with_other_tasks(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "moved"
    other.symlink_to(folder / "data")
    more = tmp_path / "more"
    more.mkdir()
    for staged in (folder / "data").iterdir():
        (more / staged.name).symlink_to(staged)
    stage(more, "math_500", [APPLES])
    ids = [
        prepare(config(folder, "suite=quick", root=str(root))).baseline["id"] for root in (folder / "data", other, more)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_quick_runs_with_no_network_and_no_bars(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")

    class Unconnected(socket.socket):  # a class, as libraries that are first imported now derive from it
        def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
            if family != socket.AF_UNIX and fileno is None:  # the sandbox talks to its keeper over a pair of those
                raise AssertionError("the network was asked for")
            super().__init__(family, type, proto, fileno)

    everything_here(monkeypatch)
    monkeypatch.setattr(socket, "socket", Unconnected)
    record = run_cell(config(folder, "suite=quick", "suite.max_new_tokens=4"))
    scores = {(score.task, score.metric): score for score in record.scores}
    assert {task for task, _ in scores} - {"diversity"} == {"humaneval", "mbpp", "gsm8k", "boolq", "writingbench"}
    assert scores["gsm8k", "exact_match"].n == 2 and scores["boolq", "acc"].n == 3
    assert set(record.config["suite"]["left_out"]) >= {"humaneval_plus", "mbpp_plus", "wikitext", "c4", "wildbench"}
    assert all(score.low <= score.value <= score.high for score in record.scores)
    assert "%|" not in capfd.readouterr().err, "progress=false: not even a library's bar"


def quick(root: Path, *left: str) -> dict[str, Any]:
    """A suite of two sets and what scores their texts."""
    sets = {name: {"data_set": name, "root": str(root)} for name in ("gsm8k", "writingbench")}
    return {"name": "q", "missing": "skip", "tasks": {**sets, "diversity": {"sources": ["writingbench"]}}}


def test_a_suite_of_which_nothing_can_be_asked_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotStaged, match="has the data of no task of suite=q: run winnow-data stage --only"):
        with_data(quick(tmp_path / "nothing here"))
    kept = with_data(quick(folder / "data"))
    assert set(kept["tasks"]) == {"gsm8k", "writingbench", "diversity"}
    stage(tmp_path, "gsm8k", [APPLES])
    kept = with_data(quick(tmp_path))  # one is there
    assert set(kept["tasks"]) == {"gsm8k", "diversity"} and kept["left_out"] == ["writingbench"]


def test_the_command_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="run winnow-data stage"):
        prepare(config(folder, "suite=quick", root=str(tmp_path / "nosuch")))
