"""Multiple choice and LAMBADA as lm-evaluation-harness scores them, on rows of ``harness.data.sets``.

The rows hold the text that lm-eval's own task of that name renders; here they become lm-eval tasks again, so that
requests, ``acc`` and ``acc_norm`` are lm-eval's. The hub and staged data go the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.data.schema import DATA_SETS, Row
from harness.errors import WinnowError
from tasks.published.items import Benchmark
from tasks.published.lm_eval_task import LmEvalTask

# The sets whose lm-eval task has no acc_norm.
PLAIN = ("winogrande", "boolq", "rte", "mmlu")
KINDS = ("choice", "cloze")


def _mean(*metrics: str) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]


def task_config(name: str, data_set: str, rows: list[Row]) -> dict[str, Any]:
    """The configuration of an lm-eval task on ``rows``, all of one kind and one group."""
    import datasets

    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "num_fewshot": 0,
    }
    if "continuation" in rows[0]:
        last = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        return config | {
            "output_type": "loglikelihood",
            "doc_to_text": lambda row: row["context"],
            "doc_to_target": lambda row: f" {row['continuation']}",
            "metric_list": [*_mean("acc"), last],
        }
    several = any(len(row["contexts"]) > 1 for row in rows)
    if several and not all(len(row["contexts"]) == len(row["choices"]) for row in rows):
        raise WinnowError(f"{data_set}: some questions have a context for each choice, and some have not")
    # With a context for each choice, lm-eval takes the answer's index for the text, and the contexts for the choices.
    offered = "contexts" if several else "choices"
    return config | {
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["answer"] if several else row["contexts"][0],
        "doc_to_choice": lambda row: row[offered],
        "doc_to_target": lambda row: row["choices"][0] if several else row["answer"],
        "metric_list": _mean("acc") if data_set in PLAIN else _mean("acc", "acc_norm"),
    }


@dataclass(frozen=True)
class ChoiceBenchmark(Benchmark, ModelTask):
    """``acc`` and, where lm-eval's task has it, ``acc_norm``; of LAMBADA ``acc`` and ``perplexity``.

    ``data_set``: winogrande, arc_challenge, arc_easy, boolq, hellaswag, mmlu, openbookqa, rte, piqa, lambada. A set in
    groups (MMLU's subjects) gives a score for each and, under its own name, one over all questions, as lm-eval weights
    them. Zero-shot: for few-shot prompts see ``tasks.published.lm_eval_task``. Raises WinnowError as that does.
    """

    kind: ClassVar[str] = "choice"

    chat_template: bool = False

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return self._task().need_of(counter, self._loaded)

    def run(self, backend: Backend) -> TaskResult:
        return self._task().score(backend, self._loaded)

    def _task(self) -> LmEvalTask:
        self.require([name for name, known in DATA_SETS.items() if known.kind in KINDS])
        return LmEvalTask(
            self.name, (self.data_set,), chat_template=self.chat_template, seed=self.seed, domain=self.domain
        )

    def _loaded(self) -> dict[str, Any]:
        """lm-eval's tasks, and the group over them where there are several (``TaskManager.load``)."""
        from lm_eval.api.group import Group
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.config.group import AggMetricConfig

        by_group: dict[str, list[Row]] = {}
        for row in self.rows():
            by_group.setdefault(row.get("group", ""), []).append(row)
        tasks = {}
        for group, rows in sorted(by_group.items()):
            name = f"{self.data_set}_{group}" if group else self.data_set
            tasks[name] = ConfigurableTask(config=task_config(name, self.data_set, rows))
        if set(by_group) == {""}:
            return {"tasks": tasks, "groups": {}, "group_map": {}}
        whole = Group(self.data_set, aggregate_metric_list=[AggMetricConfig("acc")])
        for task in tasks.values():
            whole.add(task)
        return {"tasks": tasks, "groups": {self.data_set: whole}, "group_map": {self.data_set: list(tasks)}}
