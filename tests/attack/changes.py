"""What may change between two runs of one command: each change has to make another cell, or an error that names it."""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose, initialize_config_module

import harness.cli  # noqa: F401  (registers the resolvers of the configuration)
from harness.cells.cell import prepare
from harness.errors import WinnowError
from methods.prune_experts import ExpertPruning
from tasks.published import lm_eval_task
from tasks.published.items import benchmark_rows
from tasks.published.math import MathBenchmark
from tests.tasks.staged import stage
from tests.tiny import save_tiny

ROWS = [{"id": str(i), "question": f"What is {i} + 1?", "answer": str(i + 1), "solution": "x"} for i in range(3)]
LM_EVAL = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {examples}}}}}
test_split: test
training_split: train
fewshot_split: train
num_fewshot: 1
process_docs: !function own_docs.docs
output_type: multiple_choice
doc_to_text: "{{{{question}}}}{mark}"
doc_to_choice: [a, b]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
OWN_DOCS = "def same(row): return row\ndef docs(rows): return rows.map(same)\n"
OWN_METHOD = "from methods.prune_experts import ExpertPruning\nclass Mine(ExpertPruning): pass\n"
OWN_TASK = "from tasks.made.math import MathTask\nclass Mine(MathTask): pass\n"


@dataclass
class Case:
    """A command on files that may change. ``more`` are words behind the command."""

    folder: Path
    more: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        save_tiny(self.folder / "model", "qwen3_moe")
        self.corpus("Tom has 3 apples and buys 4 more.")
        stage(self.folder / "data", "gsm8k", ROWS)
        self.lm_eval()
        self.code(OWN_METHOD, OWN_TASK)

    def corpus(self, text: str) -> None:
        (self.folder / "corpus.jsonl").write_text(3 * (json.dumps({"text": text}) + "\n"))

    def lm_eval(self, mark: str = "", answer: int = 0, example: int = 0, docs: str = OWN_DOCS) -> None:
        (self.folder / "yaml").mkdir(exist_ok=True)
        data, examples = self.folder / "choices.jsonl", self.folder / "examples.jsonl"
        for path, right in ((data, answer), (examples, example)):
            path.write_text(json.dumps({"question": "Which?", "answer": right}) + "\n")
        (self.folder / "yaml" / "own_docs.py").write_text(docs)
        text = LM_EVAL.format(data=data, examples=examples, mark=mark)
        (self.folder / "yaml" / "own_choice.yaml").write_text(text)

    def code(self, method: str, task: str) -> None:
        (self.folder / "own_method.py").write_text(textwrap.dedent(method))
        (self.folder / "own_task.py").write_text(textwrap.dedent(task))

    def command(self) -> list[str]:
        return [
            "model=local", f"model.path={self.folder / 'model'}", "calibration=local",
            f"calibration.path={self.folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none", "backend=hf",
            f"output_dir={self.folder / 'out'}", "progress=false", "ratio=0.5", "keep_checkpoint=false",
            "method._target_=own_method.Mine", *self.more,
        ]  # fmt: skip

    def ids(self) -> tuple[str, str]:
        """Of the cell and of its baseline, as a process that starts now would have them."""
        benchmark_rows.cache_clear()
        lm_eval_task._task_manager.cache_clear()
        for name in ("own_method", "own_task"):
            sys.modules.pop(name, None)
        with patch.object(sys, "path", [str(self.folder), *sys.path]):
            with initialize_config_module("conf", version_base="1.3"):
                config = compose("config", self.command())
            config.suite = {"name": "mine", "tasks": self.tasks()}
            cell = prepare(config)
        return cell.id, cell.baseline["id"]

    def tasks(self) -> dict[str, Any]:
        return {
            "gsm8k": {
                "_target_": "tasks.published.math.MathBenchmark", "name": "gsm8k", "data_set": "gsm8k",
                "root": str(self.folder / "data"),
            },
            "choice": {
                "_target_": "tasks.published.lm_eval_task.LmEvalTask", "name": "choice", "tasks": ["own_choice"],
                "include_path": str(self.folder / "yaml"),
            },
            "own": {"_target_": "own_task.Mine", "items": 2},
        }  # fmt: skip

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        path = self.folder / "model" / name
        path.write_bytes(change(path.read_bytes() if path.is_file() else b""))


def flipped(place: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = place % len(content)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return change


def json_with(**more: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content or b"{}") | more).encode()


def _restaged(case: Case) -> None:
    shutil.rmtree(case.folder / "data")
    stage(case.folder / "data", "gsm8k", [*ROWS[:2], ROWS[2] | {"answer": "7"}])


@contextmanager
def _version(of: type) -> Iterator[None]:
    with patch.object(of, "version", f"{of.version} and more"):
        yield


@contextmanager
def _torch() -> Iterator[None]:
    with patch("harness.cells.cell.versions", lambda: {"torch": "another"}):
        yield


# Name -> the change, and whether the uncompressed model's numbers are changed as well.
CONTENT: dict[str, tuple[Callable[[Case], Any], bool]] = {
    "the calibration text": (lambda c: c.corpus("Something else."), False),
    "the calibration file is gone": (lambda c: (c.folder / "corpus.jsonl").unlink(), False),
    "tokenizer.json": (lambda c: c.edit("tokenizer.json", lambda content: content + b" "), True),
    "tokenizer_config.json": (lambda c: c.edit("tokenizer_config.json", json_with(note="x")), True),
    "the chat template": (lambda c: c.edit("chat_template.jinja", lambda _: b"{{ messages }}"), True),
    "generation_config.json": (lambda c: c.edit("generation_config.json", json_with(eos_token_id=5)), True),
    "config.json": (lambda c: c.edit("config.json", json_with(rope_theta=12345.0)), True),
    "a bit of the last weight": (lambda c: c.edit("model.safetensors", flipped(-3)), True),
    "a bit in the middle of the weights": (lambda c: c.edit("model.safetensors", flipped(100_001)), True),
    "staged data": (_restaged, True),
    "an lm-eval YAML": (lambda c: c.lm_eval(mark="!"), True),
    "the data of an lm-eval task": (lambda c: c.lm_eval(answer=1), True),
    "the examples of an lm-eval task": (lambda c: c.lm_eval(example=1), True),
    "the code beside an lm-eval YAML": (lambda c: c.lm_eval(docs=OWN_DOCS + "# other\n"), True),
    "the code of an own method": (lambda c: c.code(OWN_METHOD + "# other\n", OWN_TASK), False),
    "the code of an own task": (lambda c: c.code(OWN_METHOD, OWN_TASK + "# other\n"), True),
    "backend.open.max_length": (lambda c: c.more.append("backend.open.max_length=128"), True),
    "model.dtype": (lambda c: c.more.append("model.dtype=bfloat16"), True),
    "a setting of the method": (lambda c: c.more.append("method.scope=global"), False),
}  # fmt: skip
CODE = {
    "the version of a method": (lambda: _version(ExpertPruning), False),
    "the version of a task": (lambda: _version(MathBenchmark), True),
    "the version of torch, where versions are strict": (_torch, True),
}


def noticed(folder: Path) -> dict[str, bool]:
    """Change -> whether it made another cell (and another baseline, where it bears on it) or an error."""
    found = {}
    for number, (name, (change, of_baseline)) in enumerate(CONTENT.items()):
        case = Case(folder / str(number))
        before = case.ids()
        assert case.ids() == before, "the same is the same"
        change(case)
        try:
            after = case.ids()
        except WinnowError as error:
            found[name] = str(case.folder / "corpus.jsonl") in str(error)
        else:
            found[name] = after[0] != before[0] and (after[1] != before[1]) is of_baseline
    case = Case(folder / "code", ["strict_versions=true"])
    before = case.ids()
    for name, (changed, of_baseline) in CODE.items():
        with changed():
            after = case.ids()
        found[name] = after[0] != before[0] and (after[1] != before[1]) is of_baseline
    return found
