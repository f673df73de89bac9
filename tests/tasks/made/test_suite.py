"""The suite as configured, run on a tiny model through the real backend."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from harness.backends.hf import HFBackend
from harness.contracts.record import Sample
from tests.tiny import byte_tokenizer, tiny_model

CONF = Path(__file__).parents[3] / "conf"
TASKS = ["code", "math", "writing", "multiple_choice", "perplexity", "diversity"]


def suite(name: str, *overrides: str) -> dict[str, object]:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[f"+suite={name}", *overrides])
    # One by one: as parts of a config, dataclasses would become configs themselves.
    return {name: instantiate(task, _convert_="all") for name, task in config.suite.tasks.items()}


def test_the_reference_suite_names_its_tasks() -> None:
    tasks = suite("reference", "suite.items=7")
    assert list(tasks) == TASKS
    assert all(getattr(task, "name", None) == name for name, task in tasks.items())
    assert {getattr(task, "items", 7) for task in tasks.values()} == {7}
    assert suite("none") == {}


def test_every_task_runs_on_a_tiny_model() -> None:
    lengths = [f"+suite.tasks.{name}.max_new_tokens=4" for name in ("code", "math", "writing")]
    tasks = suite("reference", "suite.items=2", *lengths)
    backend = HFBackend(tiny_model("qwen3_moe"), byte_tokenizer())
    samples: list[Sample] = []
    for name in TASKS:
        task = tasks[name]
        result = task.run_on(samples) if hasattr(task, "run_on") else task.run(backend)  # type: ignore[attr-defined]
        assert result.scores, name
        assert all(score.low <= score.value <= score.high and score.n > 0 for score in result.scores), name
        samples += result.samples
    assert {sample.task for sample in samples} == set(TASKS)
    assert len({(sample.task, sample.item) for sample in samples}) == len(samples)


def test_the_diagnostics_suite_adds_to_the_reference_suite_what_scores_its_texts() -> None:
    tasks = suite("diagnostics", "suite.items=7")
    reference = suite("reference", "suite.items=7")
    assert {name: tasks[name] for name in reference} == reference
    assert list(tasks) == [*TASKS, "generation", "drift"]
