"""What every method decides and every task scores on a fixed input, with the version that did so.

``tests/golden.json`` holds a digest of each. Where a digest changes and its version does not, a test fails: raise the
version of the method or task (it is part of every cell's id), then write the file anew with ``python -m tests.golden``.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from harness.contracts.method import Method
from harness.contracts.record import Sample, Score
from harness.contracts.task import ModelTask, SamplesTask, Task
from tasks.made.perplexity import DOMAINS
from tests.methods.conftest import made_up_case
from tests.tasks.scripted import ScriptedBackend

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
            found[path.stem] = {"version": method.version, "digest": digest(plan.to_json())}
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


KINDS: dict[str, Callable[[], dict[str, dict[str, str]]]] = {"decisions": decisions, "scores": scores}


def stored() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    FILE.write_text(json.dumps({kind: make() for kind, make in KINDS.items()}, indent=1) + "\n")
