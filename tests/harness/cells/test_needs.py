"""What tasks tell of their longest sequence, against a backend that keeps the length of whatever it is asked for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

pytest.importorskip("lm_eval")

from harness.backends.counter import Counter
from harness.backends.tokens import encode, prompts_that_fit, scoring_requests, windows
from harness.cells.cell import tasks_of
from harness.cells.needs import longest_request
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.backend import Distributions, LogLikelihood, Sampling
from harness.contracts.record import Sample
from harness.contracts.task import BesideTask, ModelTask, SamplesTask, Task, TaskResult, TellsNeed, TwoModelsTask
from harness.errors import WinnowError
from harness.reference import MODEL_FOLDER
from tests.tasks.published import test_benchmark_contest as contest
from tests.tasks.published.test_benchmark_code import ADD, DOUBLE
from tests.tasks.published.test_benchmark_consistency import ARC, MMLU
from tests.tasks.published.test_benchmark_math import APPLES, HALF
from tests.tasks.published.test_benchmark_plus import HALF as HALVES
from tests.tasks.published.test_benchmark_plus import problem
from tests.tasks.published.test_lm_eval_task import CHOICE, PROMPTS, QUESTIONS, ROLLING, TEXTS, WRITE
from tests.tasks.staged import stage

CONF = Path(__file__).parents[3] / "conf"
SUITES = sorted(path.stem for path in (CONF / "suite").glob("*.yaml") if path.stem != "none")
LONG = 2**16
# A chat template with a switch for thoughts, as Qwen3's has it, and one that opens a thought in every prompt.
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>"
SWITCH = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
OPENED = TURNS + "<think>{% endif %}"


class Recording(Counter):
    """A backend without a model that cuts and windows texts as vLLM's does. Answers are bytes that are no text, which
    take more tokens when they are read again than when they were written."""

    name = "recording"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.most = 0

    def asked(self, *lengths: int) -> None:
        self.most = max([self.most, *lengths])
        assert self.most <= self.max_length

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        encoded = prompts_that_fit(self.tokenizer, prompts, max_new_tokens, self.max_length)
        self.asked(*(len(tokens) + max_new_tokens for tokens in encoded))
        return ["\ufffd" * max_new_tokens] * len(prompts)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        requests = list(scoring_requests(self.tokenizer, pairs, self.max_length - 1))
        self.asked(*(len(one.context) + len(one.continuation) for one in requests))
        return [LogLikelihood(-float(one.index), len(one.continuation)) for one in requests]

    def loglikelihood_rolling(self, texts: Sequence[str], progress: str = "") -> list[LogLikelihood]:
        encoded = encode(self.tokenizer, texts)
        self.asked(*(len(part) for tokens in encoded for part in windows(tokens, self.max_length - 2)))
        return [LogLikelihood(-1.0, max(0, len(tokens) - 1)) for tokens in encoded]

    def distributions(
        self, pairs: Sequence[tuple[str, str]], positions: int, progress: str = ""
    ) -> Iterator[tuple[int, Distributions]]:
        for one in scoring_requests(self.tokenizer, pairs, self.max_length - 1):
            self.asked(len(one.context) + len(one.continuation))
            count = min(positions, len(one.continuation))
            expected = np.full((count, 2), np.log(0.5), dtype=np.float32)
            yield one.index, Distributions(np.array(one.continuation), np.zeros(len(one.continuation)), expected)

    def score_tokens(self, sequences: list[list[int]], top: int, progress: str = "") -> list[list[dict[int, float]]]:
        self.asked(*map(len, sequences))
        return [[{token: -1.0} for token in tokens[1:]] for tokens in sequences]

    def close(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each published set, one of them longer than the others."""
    root = tmp_path_factory.mktemp("data")
    word = "many more words of it "
    stage(root, "humaneval", [DOUBLE, DOUBLE | {"id": "1", "prompt": f"{DOUBLE['prompt']}    # {word * 9}\n"}])
    stage(root, "mbpp", [ADD, ADD | {"id": "12", "text": word * 12}])
    for plus in ("humaneval_plus", "mbpp_plus"):
        rows = [problem(plus, number, "half", HALVES, [[2]], [[3]]) for number in (0, 1)]
        rows[1]["prompt"] = f"# {word * 7}\n{rows[1]['prompt']}"
        stage(root, plus, rows)
    stage(root, "gsm8k", [APPLES, APPLES | {"id": "1", "question": word * 11}])
    stage(root, "math_500", [HALF, HALF | {"id": "1", "question": word * 13}])
    two = [ARC[0] | {"id": "w", "contexts": [word * 5, "He "], "choices": ["went."] * 2, "answer": 1}]
    for name in ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "piqa"):
        stage(root, name, [*ARC, ARC[0] | {"id": "9", "contexts": [f"{word * 8}\nAnswer:"]}])
    stage(root, "winogrande", two)
    stage(root, "mmlu", MMLU)
    stage(root, "lambada", [{"id": "0", "context": "He saw the", "continuation": "sun"}])
    for name in ("wikitext", "c4"):
        stage(root, name, [{"id": "0", "text": "A line."}, {"id": "1", "text": word * 90}])
    for name in ("wildbench", "writingbench"):
        stage(
            root, name, [{"id": "0", "prompt": word, "checklist": []}, {"id": "1", "prompt": "A poem", "checklist": []}]
        )
    stage(root, "livecodebench", [contest.SUM, contest.PAIRS])
    for name, task, rows in (("choice", CHOICE, QUESTIONS), ("rolling", ROLLING, TEXTS), ("write", WRITE, PROMPTS)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(root / f"{name}.jsonl")}}
        config = {"task": f"own_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (root / f"{name}.yaml").write_text(json.dumps(config | task))
    return root


def tasks_of_suite(suite: str, data: Path, *more: str) -> dict[str, Task]:
    given = [f"suite={suite}", f"data.root={data}", *more]
    given += [] if suite in ("lm_eval_local",) else ["suite.items=6"]
    if suite == "lm_eval_local":
        given += [f"suite.include_path={data}", "suite.names=[own_choice,own_rolling,own_write]"]
    with initialize_config_module("conf", version_base="1.3"):
        return tasks_of({"suite": OmegaConf.to_container(compose("config", overrides=given).suite, resolve=True)})


def run(task: Task, backend: Recording, samples: Sequence[Sample]) -> list[Sample]:
    match task:
        case TwoModelsTask():
            task.compare(task.observe(backend, samples, None), backend)
            return []
        case BesideTask():
            return task.run_against(backend, samples, None).samples
        case SamplesTask():
            return task.run_on(samples).samples
        case ModelTask():
            return task.run(backend).samples
    raise AssertionError(f"{task} is no task")


def check(tasks: Mapping[str, Task], tokenizer: Any, max_length: int) -> int | None:
    """Every task's need against what it asks for; gives back that of all."""
    counter, samples, needs, most = Counter(tokenizer, max_length), [], {}, 0
    for task in tasks.values():
        backend = Recording(tokenizer, max_length)
        samples += run(task, backend, samples)
        most = max(most, backend.most)
        if isinstance(task, SamplesTask):
            assert backend.most == 0
            continue
        assert isinstance(task, TellsNeed), f"{task.name} does not tell its need"
        needs[task.name] = need = task.need(counter, needs)
        assert need is not None
        if isinstance(task, TwoModelsTask):  # which texts it takes is not known before
            assert backend.most <= need.tokens
        else:  # of a text in windows the engine has one token less than the model takes
            assert backend.most in (min(need.tokens, max_length), min(need.tokens, max_length - 1)), task.name
            assert need.tokens >= max_length or backend.most == need.tokens, task.name
    told = longest_request(tasks, counter)
    assert told is not None and told >= most
    return told


@pytest.mark.parametrize("suite", SUITES)
def test_no_request_is_longer_than_what_was_told_and_one_is_as_long(data: Path, suite: str) -> None:
    tasks = tasks_of_suite(suite, data)
    for max_length in (LONG, 512):
        check(tasks, load_tokenizer(MODEL_FOLDER), max_length)


@pytest.mark.parametrize(
    ("template", "thinking"), [(SWITCH, "auto"), (SWITCH, "on"), (SWITCH, "off"), (OPENED, "auto")]
)
def test_thoughts_and_templates_count(data: Path, template: str, thinking: str) -> None:
    tokenizer = load_tokenizer(MODEL_FOLDER)
    tokenizer.chat_template = template
    told = {}
    for suite in ("paper_code", "paper_math", "paper_writing", "livecodebench"):
        told[suite] = check(tasks_of_suite(suite, data, f"suite.thinking={thinking}"), tokenizer, LONG)
    opened = set(told) - {"paper_code"} if template == OPENED else set()  # answers with code are begun behind it
    assert {suite for suite, tokens in told.items() if tokens > 8192} == (set(told) if thinking == "on" else opened)


def test_texts_in_windows_are_as_long_as_the_model_allows(data: Path) -> None:
    tokenizer = load_tokenizer(MODEL_FOLDER)
    (task, *_) = tasks_of_suite("paper_ppl", data).values()
    backend = Recording(tokenizer, 64)
    task.run(backend)
    assert backend.most == 63 and task.need(backend, {}).tokens > 64


@dataclass(frozen=True)
class Own(ModelTask):
    kind: ClassVar[str] = "generative"
    version: ClassVar[int] = 1
    name: str = "own"
    domain: str = "code"

    def run(self, backend: Any) -> TaskResult:
        return TaskResult([], [])


def test_a_task_that_does_not_tell_leaves_the_model_its_own_limit(data: Path) -> None:
    tasks = tasks_of_suite("diagnostics", data)
    counter = Counter(load_tokenizer(MODEL_FOLDER), LONG)
    assert longest_request({"own": Own()}, counter) is None
    assert longest_request({"own": Own()} | tasks, counter) is None
    assert tasks["drift"].need(counter, {"own": None}) is None
    assert longest_request({}, counter) is None


def test_the_longest_text_is_found_among_many() -> None:
    tokenizer = load_tokenizer(MODEL_FOLDER)
    counter = Counter(tokenizer, LONG)
    texts = [f"{'def f(x): return x ' * (n % 40)}{'é' * (n % 23)}" for n in range(900)]
    lengths = list(map(len, encode(tokenizer, texts)))
    assert counter.longest(texts) == max(lengths)
    assert counter.longest([""]) == counter.longest([]) == 1
    pairs = [(text, f" {text[:9]}a") for text in texts] + [("", "x" * 3), (" ", "y")]
    requests = list(scoring_requests(tokenizer, pairs, LONG))
    assert counter.longest_pair(pairs) == max(len(one.context) + len(one.continuation) for one in requests)
    for pair in (("", "x"), (" ", "y z"), ("a", " b"), ("", "def f(x):")):
        (one,) = scoring_requests(tokenizer, [pair], LONG)
        assert counter.longest_pair([pair]) == len(one.context) + len(one.continuation)


def test_a_task_that_cannot_be_asked_says_so(data: Path) -> None:
    tasks = tasks_of_suite("paper_math", data, "suite.thinking=on")
    with pytest.raises(WinnowError, match="asked in chat"):
        longest_request(tasks, Counter(load_tokenizer(MODEL_FOLDER), LONG))
