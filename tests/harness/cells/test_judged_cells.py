"""Whole cells with a judge: what of it counts for a cell's identity, and where a cell finds the baseline's texts."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from harness.cells.cell import prepare
from harness.cells.run import run_cell
from harness.errors import WinnowError
from harness.records.store import RecordStore
from tests.judge_endpoint import asked, serving
from tests.tasks.published.test_judged_writing import ROWS, stage
from tests.tiny import save_tiny

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    save_tiny(folder / "model", "olmoe")
    stage(folder / "data", ROWS)
    return folder


def config(folder: Path, *overrides: str, suite: str = "paper_writing") -> DictConfig:
    chosen = [
        "model=local", f"model.path={folder / 'model'}", "method=random", "ratio=0.25", "backend=hf", f"suite={suite}",
        f"output_dir={folder / 'out'}", "progress=false", f"data.root={folder / 'data'}", *overrides,
    ]  # fmt: skip
    if suite == "paper_writing":
        chosen.append("~suite.tasks.wildbench")
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=chosen)


JUDGED = ("judge=openai", "judge.model=critic", "judge.api_key_env=null")


def ids(folder: Path, *overrides: str, suite: str = "paper_writing") -> tuple[str, str]:
    cell = prepare(config(folder, *overrides, suite=suite))
    return cell.id, cell.baseline["id"]


def test_a_cell_with_a_judge_is_another_cell_and_how_the_judge_is_reached_is_not(folder: Path) -> None:
    alone = ids(folder)
    judged = ids(folder, *JUDGED, "judge.base_url=http://localhost:1/v1")
    assert not set(alone) & set(judged)
    assert judged == ids(
        folder, *JUDGED, "judge.base_url=http://localhost:2/v1", "judge.retries=0", "judge.timeout=9",
        "judge.concurrency=2", "judge.backoff=0",
    )  # fmt: skip
    at_one = (*JUDGED, "judge.base_url=http://localhost:1/v1")
    for change in ("judge.model=other", "judge.request.temperature=1", "suite.items=2"):
        assert not set(judged) & set(ids(folder, *at_one, change)), change


def test_a_judge_does_not_count_for_a_suite_that_judges_nothing(folder: Path) -> None:
    given = ids(folder, *JUDGED, "judge.base_url=http://localhost:1/v1", suite="reference")
    assert given == ids(folder, suite="reference")


def test_a_judge_without_an_address_or_a_key_is_said_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WinnowError, match=r"settings without a value: judge.base_url, judge.model"):
        prepare(config(folder, "judge=openai"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(WinnowError, match="judge.api_key_env=OPENAI_API_KEY is not set"):
        prepare(config(folder, "judge=openai", "judge.model=critic", "judge.base_url=http://localhost:1/v1"))


def test_a_cell_is_judged_against_the_texts_of_the_baseline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", "secret-3")

    def answer(body: dict[str, Any]) -> str:
        return '{"winner": "B"}' if '"winner"' in asked(body) else '{"scores": [2, 4]}'

    with serving(answer) as endpoint:
        overrides = (
            "judge=openai", "judge.model=critic", "judge.api_key_env=JUDGE_KEY", f"judge.base_url={endpoint.url}",
            "suite.max_new_tokens=8",
        )  # fmt: skip
        record = run_cell(config(folder, *overrides))
    texts = {}
    for kind, cell in (("baseline", record.cell["baseline"]), ("records", record.cell["id"])):
        store = RecordStore(folder / "out", kind)
        assert "secret-3" not in store.path(cell).read_text()
        written = [sample for sample in store.read_samples(cell) or [] if sample.task == "writingbench"]
        assert "secret-3" not in json.dumps([sample.detail for sample in written])
        texts[kind] = {sample.item: sample.output for sample in written}
        judged = {score.task for score in store.read(cell).scores}
        assert "writingbench_rubric" in judged and ("writingbench_pairwise" in judged) == (kind == "records")
    assert any(texts["records"][item] != texts["baseline"][item] for item in texts["records"])
    for sample in written:
        if "prompts" in sample.detail["pairwise"]:
            ours_first = sample.detail["pairwise"]["prompts"][0]
            assert f'<text name="A">\n{sample.output}\n</text>' in ours_first
            assert f'<text name="B">\n{texts["baseline"][sample.item]}\n</text>' in ours_first
    (win_rate,) = (score for score in record.scores if score.metric == "win_rate")
    assert win_rate.value == 0.5 and win_rate.n == len(ROWS)
