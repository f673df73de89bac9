"""What evaluation makes of the scores of a suite's tasks, and how it asks each kind of task."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from harness.cells import evaluate as evaluation
from harness.cells.evaluate import Clock, Evaluation, evaluate
from harness.contracts.record import KINDS, Sample, Score
from harness.contracts.task import BesideTask, ModelTask, Need, SamplesTask, TaskResult, TwoModelsTask
from harness.errors import WinnowError
from harness.reference import MODEL_FOLDER
from tests.tasks.scripted import ScriptedBackend

CONF = Path(__file__).parents[3] / "conf"
HF = {"name": "hf", "open": {}}
HERE = "tests.harness.cells.test_evaluate"


class Opened(ScriptedBackend):
    """A model that answers nothing, with what evaluation asks of a backend besides."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.closed = folder, False
        self.seconds: dict[str, float] = {"generate": 1.0}
        self.facts = {"version": "0"}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch) -> list[Opened]:
    """The models in the order in which they were opened."""
    found: list[Opened] = []

    def open_one(config: Mapping[str, Any], folder: Path) -> Opened:
        assert all(one.closed for one in found), "two models are open at once"
        found.append(Opened(folder))
        return found[-1]

    monkeypatch.setattr(evaluation, "_open", open_one)
    return found


def suite(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base="1.3"):
        config: DictConfig = compose("config", ["suite=reference", "suite.items=2", *overrides])
    return {"suite": OmegaConf.to_container(config.suite, resolve=True), "backend": HF}


def own_suite(*classes: type) -> dict[str, Any]:
    tasks = {one.__name__: {"_target_": f"{HERE}.{one.__name__}", "name": one.__name__} for one in classes}
    return {"suite": {"name": "own", "tasks": tasks}, "backend": HF}


def run(config: dict[str, Any], **more: Any) -> Evaluation:
    return evaluate(config, Path("compressed"), Clock(), **more)


def test_vllm_is_told_the_longest_sequence_of_the_suite_for_both_models(monkeypatch):
    def openings(**options: Any) -> list[Any]:
        found: list[Any] = []

        def open_one(config: Mapping[str, Any], folder: Path) -> Opened:
            found.append((folder, config["backend"]["open"].get("longest")))
            return Opened(folder)

        monkeypatch.setattr(evaluation, "_open", open_one)
        config = own_suite(Tells) | {"backend": {"name": options.pop("name", "vllm"), "open": options}}
        clock = Clock()
        evaluate(config, MODEL_FOLDER, clock, baseline=[], uncompressed=Path("uncompressed"))
        assert ("lengths" in clock.seconds) == (found[0][1] is not None)
        return found

    assert openings(max_length=None) == [(MODEL_FOLDER, 70), (Path("uncompressed"), 70)]
    assert openings(max_length=64) == openings(name="hf") == [(MODEL_FOLDER, None), (Path("uncompressed"), None)]


def stamped(found: Evaluation) -> dict[str, set[tuple[str, str]]]:
    return {
        task: {(s.kind, s.domain) for s in found.scores if s.task == task} for task in {s.task for s in found.scores}
    }


def test_scores_have_the_kind_and_the_domain_of_their_task(opened):
    assert stamped(run(suite())) == {
        "code": {("generative", "code")},
        "math": {("generative", "math")},
        "writing": {("generative", "writing")},
        "multiple_choice": {("choice", "knowledge")},
        "perplexity": {("perplexity", "language")},
    }
    assert [one.folder for one in opened] == [Path("compressed")] and opened[0].closed


def test_a_suites_yaml_may_say_another_domain(opened):
    found = stamped(run(suite("+suite.tasks.math.domain=science", "+suite.tasks.multiple_choice.domain=trivia")))
    assert found["math"] == {("generative", "science")} and found["multiple_choice"] == {("choice", "trivia")}
    assert found["code"] == {("generative", "code")}


def test_every_task_of_every_suite_says_kind_domain_and_version():
    seen = set()
    for path in sorted(CONF.glob("suite/*.yaml")):
        with initialize_config_module("conf", version_base="1.3"):
            nodes = compose("config", [f"suite={path.stem}"]).suite.tasks
        for node in nodes.values():
            task = get_class(node._target_)
            seen.add(task)
            assert task.kind in KINDS and task.version >= 1, task
            assert "domain" in {field.name for field in fields(task)}, task
            assert {ModelTask, BesideTask, SamplesTask, TwoModelsTask} & {*task.__mro__}, task
    assert len(seen) >= 15


class Own:
    """What the tasks below share."""

    version: ClassVar[int] = 1
    kind: ClassVar[str] = "choice"

    def answer(self, seen: str) -> TaskResult:
        name = type(self).__name__
        scores = [
            Score(name, "acc", 0.5, 2, 0.0, 1.0),
            Score(name, "length", 3.0, 2, 1.0, 9.0, kind="probe", domain="writing"),
        ]
        return TaskResult(scores, [Sample(name, "item", 1.0, output=seen)])


@dataclass(frozen=True)
class Asks(Own, ModelTask):
    name: str
    domain: str = "law"

    def run(self, backend: Any) -> TaskResult:
        return self.answer(backend.folder.name)


@dataclass(frozen=True)
class Reads(Own, SamplesTask):
    name: str
    domain: str = "law"

    def run_on(self, samples: Any) -> TaskResult:
        return self.answer(" ".join(sample.task for sample in samples))


@dataclass(frozen=True)
class Compares(Own, BesideTask):
    name: str
    domain: str = "law"

    def run_against(self, backend: Any, samples: Any, baseline: Any) -> TaskResult:
        return self.answer(f"{backend.folder.name} {len(samples)} {baseline}")


@dataclass(frozen=True)
class Observes(Own, TwoModelsTask):
    name: str
    domain: str = "law"

    def observe(self, backend: Any, samples: Any, baseline: Any) -> str:
        return f"{backend.folder.name} {len(samples)}"

    def compare(self, seen: Any, backend: Any) -> TaskResult:
        return self.answer(f"{seen} {backend.folder.name}")


@dataclass(frozen=True)
class Tells(Observes):
    def need(self, counter: Any, before: Any) -> Need:
        return Need(70)


@dataclass(frozen=True)
class Plain(Own):
    """Of no protocol's class, but with all that one names."""

    name: str
    domain: str = "law"

    def tokens_to_write(self) -> int:
        return 0

    def item_texts(self) -> list[str]:
        return []

    def items_content(self) -> Any:
        return None

    def run(self, backend: Any) -> TaskResult:
        return self.answer(backend.folder.name)


@dataclass(frozen=True)
class Nothing(Own):
    name: str
    domain: str = "law"

    def tokens_to_write(self) -> int:
        return 0

    def item_texts(self) -> list[str]:
        return []

    def items_content(self) -> Any:
        return None


def test_a_score_may_say_its_own_kind_and_domain(opened):
    first, second = run(own_suite(Asks)).scores
    assert (first.kind, first.domain) == ("choice", "law")
    assert (second.kind, second.domain) == ("probe", "writing")


def test_every_kind_of_task_gets_what_it_asks_for(opened):
    found = run(own_suite(Asks, Reads, Compares, Observes, Plain), baseline=[], uncompressed=Path("whole"))
    assert {sample.task: sample.output for sample in found.samples} == {
        "Asks": "compressed",
        "Reads": "Asks",
        "Compares": "compressed 2 []",
        "Observes": "compressed 3 whole",
        "Plain": "compressed",
    }
    assert [one.folder.name for one in opened] == ["compressed", "whole"]
    of_baseline = run(own_suite(Observes))
    assert of_baseline.samples[0].output == "compressed 0 compressed" and len(opened) == 3


def test_what_asks_nothing_is_no_task(opened):
    config = own_suite(Asks)
    config["suite"]["tasks"]["nothing"] = {"_target_": f"{HERE}.Nothing", "name": "nothing"}
    with pytest.raises(WinnowError, match=r"suite.tasks.nothing: Nothing asks nothing: it has none of run"):
        run(config)
