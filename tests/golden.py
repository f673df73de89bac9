"""What every method decides and every task scores on a fixed input, with the version that did so.

``tests/golden.json`` holds a digest of each. Where a digest changes and its version does not, a test fails: raise the
version of the method or task (it is part of every cell's id), then write the file anew with ``python -m tests.golden``.
"""

import hashlib
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from harness.contracts.method import Method
from harness.contracts.plan_files import plan_arrays, plan_to_json
from harness.contracts.record import Sample, Score
from harness.contracts.task import ModelTask, SamplesTask, Task
from tasks.made.perplexity import DOMAINS
from tasks.published.code import CodeBenchmark
from tasks.published.math import MathBenchmark
from tasks.published.text import TextBenchmark
from tests.methods.conftest import made_up_case
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

FILE = Path(__file__).with_name("golden.json")
CONF = Path(__file__).parents[1] / "conf"
HALF = Fraction(1, 2)
# The made-up experts have five channels.
NARROW = {"align": 1, "min_channels": 1}
# Tasks of the reference suite, which need no data from elsewhere; what asks two models is tested with its own numbers.
SUITE = "claims"
ITEMS = 6
# Text of Python's own library changes with its version.
FIXED = {"perplexity": {"domains": [name for name in DOMAINS if name != "real_text"]}}


def digest(value: Any) -> str:
    """Of numbers to ten digits: the last ones hang on the machine."""
    return hashlib.sha256(json.dumps(_rounded(value), sort_keys=True).encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def decisions() -> dict[str, dict[str, str]]:
    """Method -> version and digest of its plan for half of a made-up model."""
    found = {}
    statistics = made_up_case(0).statistics
    with initialize_config_module("conf", version_base="1.3"):
        for path in sorted(CONF.glob("method/*.yaml")):
            node = compose("config", [f"method={path.stem}"]).method
            method: Method = instantiate(_narrowed(node))
            ratio = Fraction(0) if path.stem == "none" else HALF
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan = method.decide(statistics, ratio, seed=3).plan
            told: Any = plan_to_json(plan)
            if arrays := plan_arrays(plan):
                told = [told, {name: values.tolist() for name, values in arrays.items()}]
            found[path.stem] = {"version": method.version, "digest": digest(told)}
    return found


def _narrowed(node: Any) -> dict[str, Any]:
    plain = {key: _narrowed(value) if isinstance(value, Mapping) else value for key, value in node.items()}
    return plain | {key: value for key, value in NARROW.items() if key in plain}


def scores() -> dict[str, dict[str, str]]:
    """Task of the reference suites -> version and digest of its scores and its samples' scores, of a scripted model."""
    backend = ScriptedBackend(write=_written, score=_scored)
    found, samples = {}, []
    with initialize_config_module("conf", version_base="1.3"):
        suite = compose("config", [f"suite={SUITE}", f"suite.items={ITEMS}"]).suite
    for name, node in suite.tasks.items():
        task: Task = instantiate(node, _convert_="all", **FIXED.get(str(name), {}))
        if isinstance(task, ModelTask):
            result = task.run(backend)
        elif isinstance(task, SamplesTask):
            result = task.run_on(samples)
        else:
            continue
        samples += result.samples
        told = [*map(_of_score, result.scores), *map(_of_sample, result.samples)]
        found[str(name)] = {"version": str(task.version), "digest": digest(told)}
    return found


# Published tasks: a few rows made here, and answers of the forms that models give.
_SUMS = [
    {"id": str(i), "question": f"What is {i} + 2?", "solution": f"It is {i + 2}.", "answer": str(i + 2)}
    for i in range(8)
]
_MATH_FORMS = (
    "#### {0}",
    "The answer is {0}.",
    "So \\boxed{{{0}}}",
    "**{0}** apples",
    "${0}.00",
    "It is {0}, not 99",
    "nothing",
    "<think>{0}",
)
_HUMANEVAL = {
    "id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
}
_MBPP = {
    "id": "1",
    "text": "Add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
}
_CODE_FORMS = (
    "    return 2 * x",
    "```python\ndef double(x):\n    return 2 * x\n```",
    "    return x",
    "def double(x):\n    return x + x\n",
    "```\ndef add(a, b):\n    return a + b\n```",
    "def add(a, b):\n    return a - b",
    "I cannot.",
)
_TEXTS = [{"id": str(i), "text": f"The mill stood by the river for {i} years."} for i in range(5)]


def published() -> dict[str, dict[str, str]]:
    """Task on published data -> version and digest of its scores, over answers of many forms to rows made here.

    Choices are scored by lm-eval, with which their own tests compare them.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, rows in (
            ("gsm8k", _SUMS), ("math_500", [row | {"level": 1, "type": "Algebra"} for row in _SUMS]),
            ("humaneval", [_HUMANEVAL]), ("mbpp", [_MBPP]), ("wikitext", _TEXTS),
        ):  # fmt: skip
            stage(root, name, rows)
        for name, make, forms in (
            ("gsm8k", MathBenchmark, _MATH_FORMS), ("math_500", MathBenchmark, _MATH_FORMS),
            ("humaneval", CodeBenchmark, _CODE_FORMS), ("mbpp", CodeBenchmark, _CODE_FORMS),
            ("wikitext", TextBenchmark, ("",)),
        ):  # fmt: skip
            task, told = make(name, name, str(root)), []
            for form in forms:
                answers = itertools.count(2)  # in the order of the rows, which is that of the answers
                backend = ScriptedBackend(lambda _, form=form, answers=answers: form.format(next(answers)), _scored)
                result = task.run(backend)
                told += [*map(_of_score, result.scores), *map(_of_sample, result.samples)]
            found[name] = {"version": str(task.version), "digest": digest(told)}
    return found


def _of_score(score: Score) -> list[Any]:
    return [score.metric, score.part, score.value, score.low, score.high, score.n]


def _of_sample(sample: Sample) -> list[Any]:
    return [sample.item, sample.score, sample.weight]


def _written(prompt: str) -> str:
    """A different text for every prompt, some of them right in form."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest()[:4], 16)
    return f"    return [{number % 7}]\n#### {number % 50}\nOne day the old miller walked to the river. He smiled."


def _scored(context: str, continuation: str) -> float:
    return -1.0 - int(hashlib.sha256(f"{context}|{continuation}".encode()).hexdigest()[:4], 16) / 65536


KINDS: dict[str, Callable[[], dict[str, dict[str, str]]]] = {
    "decisions": decisions,
    "scores": scores,
    "published": published,
}


def stored() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    FILE.write_text(json.dumps({kind: make() for kind, make in KINDS.items()}, indent=1) + "\n")
