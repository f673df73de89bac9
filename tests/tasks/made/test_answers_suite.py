"""The suites of answers as configured, on a tiny model through the real backend."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from harness.backends.hf import HFBackend
from harness.contracts.record import Sample
from tasks.probes.confidence import CalibrationErrorTask, probabilities
from tests.tasks.published.test_benchmark_consistency import ARC
from tests.tasks.staged import stage
from tests.tiny import byte_tokenizer, tiny_model

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture(scope="module")
def backend() -> HFBackend:
    return HFBackend(tiny_model("qwen3_moe"), byte_tokenizer(), batch_size=8)


def suite(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[f"+suite={name}", *overrides])
    return {name: instantiate(task, _convert_="all") for name, task in config.suite.tasks.items()}


def run(tasks: dict[str, Any], backend: HFBackend) -> dict[str, Any]:
    samples: list[Sample] = []
    results = {}
    for name, task in tasks.items():
        results[name] = task.run_on(samples) if hasattr(task, "run_on") else task.run(backend)
        samples += results[name].samples
        assert results[name].scores and all(s.low <= s.value <= s.high and s.n for s in results[name].scores), name
    assert len({(sample.task, sample.item) for sample in samples}) == len(samples)
    return results


def test_the_answers_suite(backend: HFBackend) -> None:
    tasks = suite("answers", "suite.items=2")
    assert list(tasks) == ["multiple_choice", "calibration_error", "consistency"]
    assert all(task.name == name for name, task in tasks.items())
    results = run(tasks, backend)
    asked, scored = results["multiple_choice"].samples, results["calibration_error"].samples
    assert [s.item for s in scored] == [s.item for s in asked] and len(asked) == 8
    for question, own in zip(asked, scored, strict=True):
        assert own.detail["confidence"] == pytest.approx(max(probabilities(question.detail["logprobs"])))
        assert own.detail["right"] == question.score, "the confidence is that of the answer that acc counts"


def test_lm_eval_s_samples_have_a_calibration_too(backend: HFBackend, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    root = stage(tmp_path, "arc_challenge", ARC)
    tasks = suite("paper_answers", f"+data.root={root}")
    assert tasks["calibration_error"].sources == [
        "arc_challenge",
        "arc_easy",
        "boolq",
        "hellaswag",
        "mmlu",
        "openbookqa",
        "rte",
    ]
    kept = {name: tasks[name] for name in ("arc_challenge", "calibration_error", "arc_challenge_order")}
    results = run(kept, backend)
    asked, scored = results["arc_challenge"].samples, results["calibration_error"].samples
    assert [s.detail["right"] for s in scored] == [s.score for s in asked] and len(scored) == len(ARC)
    assert {s.domain for s in scored} == {"arc_challenge"}
    assert isinstance(tasks["calibration_error"], CalibrationErrorTask)
