"""Tasks of lm-evaluation-harness, its own and local ones, as a task of a suite. lm-eval is imported when it runs."""

import difflib
import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from harness.backends.thinking import opened_thought
from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample, Score
from harness.contracts.task import ModelTask, Need, TaskResult
from harness.errors import BrokenModel, WinnowError
from tasks.published.domains import domain_of
from tasks.published.generative import truncated_score
from tasks.published.lm_eval_values import (
    higher_is_better,
    interval_of,
    is_perplexity,
    logprobs_of,
    metric_name,
    samples_of,
)
from tasks.published.thought import split_thought

# lm-eval's own default, so that seed=0 takes the few-shot examples that its command line takes.
FIRST_SEED = 1234


@dataclass(frozen=True)
class LmEvalTask(ModelTask):
    """lm-eval's tasks, groups and tags by name. In a suite::

        arc: {_target_: tasks.published.lm_eval_task.LmEvalTask, name: arc, tasks: [arc_easy, arc_challenge]}

    ``include_path``: a folder of task YAML files, used instead of lm-eval's own. ``num_fewshot``: None keeps the
    tasks' own; a task that says 0 keeps it always. ``limit``: items a task. ``seed`` is of few-shot examples, sampling
    and bootstrap intervals. ``domains`` says what tasks are about (lm-eval task -> domain); of others ``domain`` does,
    or else ``tasks.published.domains``.

    The part of a score, and the domain of a sample, is the lm-eval task (or group). A metric has lm-eval's name, with
    its filter after a comma unless it is "none". A sample's score is its first metric, on which cells can be paired;
    for perplexities the negative log-likelihood in nats, with the number of words or bytes as weight. Intervals:
    Wilson's for metrics of 0 and 1, else a bootstrap over documents; those of a group are its tasks' intervals, their
    half-widths added in squares with the weights that the group gives them. Texts are scored without what a model
    thinks aloud in them; where some do, ``truncated`` of ``name_truncated`` is the share that ends inside a thought.

    Raises WinnowError for names that lm-eval does not know, tasks that cannot be loaded or would run what the model
    writes, and log-likelihoods that are not finite.
    """

    kind: ClassVar[str] = "choice"
    version: ClassVar[int] = 1

    name: str
    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    seed: int = 0
    domain: str = ""
    domains: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            example = "such as suite.names=[arc_easy]"
            raise WinnowError(f"{self.name}: tasks={self.tasks!r}: give a list of lm-eval tasks, {example}")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise WinnowError(f"{self.name}: include_path={self.include_path}: there is no such folder")
        if find_spec("lm_eval") is None:
            raise WinnowError(f'{self.name}: lm-eval is not installed: pip install "moe-winnow[eval]"')

    def run(self, backend: Backend) -> TaskResult:
        return self.score(backend, self._load)

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need:
        return self.need_of(counter, self._load)

    def need_of(self, counter: TokenCounter, load: Callable[[], Any]) -> Need:
        """What the tasks need that ``load`` gives, from the requests that lm-eval builds of them."""
        from lm_eval.evaluator_utils import get_sample_size

        from harness.backends.lm_eval import counting_model, longest_request

        model = counting_model(counter)
        self._require_template(model)
        with _quiet():
            tasks = self._prepared(load())["tasks"].values()
            for task in tasks:
                task.build_all_requests(
                    limit=get_sample_size(task, self.limit),
                    apply_chat_template=self.chat_template,
                    fewshot_as_multiturn=True,
                    chat_template=model.apply_chat_template if self.chat_template else None,
                    tokenizer_name=model.tokenizer_name if self.chat_template else "",
                )
            return Need(longest_request(model, (instance for task in tasks for instance in task.instances)))

    def tokens_to_write(self) -> int:
        """At most: those of its tasks that write, each of their documents as long as its task allows."""
        with _quiet():
            tasks = self._load()["tasks"].values()
        writing = [task for task in tasks if task.get_config("output_type") == "generate_until"]
        return sum(self._documents(task) * _max_tokens(task.get_config("generation_kwargs")) for task in writing)

    def items_content(self) -> list[Any]:
        """Of each of lm-eval's tasks what its YAML says, the documents that it asks, and those of its examples; then
        the code beside the user's own YAML."""
        with _quiet():
            tasks = self._load()["tasks"]
        told: list[Any] = [
            [
                name,
                task.dump_config(),
                list(task.eval_docs)[: self.limit],
                list(task.fewshot_docs() or []) if self._shots(task) else [],
            ]
            for name, task in sorted(tasks.items())
        ]
        folder = None if self.include_path is None else Path(self.include_path)
        files = [] if folder is None else sorted(folder.rglob("*.py"))
        return told + [[path.name, path.read_text(encoding="utf-8", errors="replace")] for path in files]

    def _shots(self, task: Any) -> int:
        """How many examples stand before an item. A task that says 0 keeps it."""
        own = task.get_config("num_fewshot")
        asked = own if own == 0 or self.num_fewshot is None else self.num_fewshot
        return int(asked or 0)

    def _documents(self, task: Any) -> int:
        return min(len(task.eval_docs), self.limit or len(task.eval_docs))

    def score(self, backend: Backend, load: Callable[[], Any]) -> TaskResult:
        """The scores of what ``load`` gives: tasks and groups as of ``lm_eval.tasks.TaskManager.load``."""
        from harness.backends.lm_eval import language_model

        with _quiet():
            model = language_model(backend)
        thoughts = _answers_alone(model)
        self._require_template(model)
        with _quiet():
            loaded = load()
            results = self._evaluate(model, loaded)
        scores: dict[tuple[str, str], Score] = {}
        samples: list[Sample] = []
        for name, task in loaded["tasks"].items():
            rows = results["samples"][name]
            self._require_finite(name, rows)
            aggregation = task.aggregation()
            found = self._scores(name, rows, aggregation, results)
            scores |= {key: self._filed(score, task, aggregation) for key, score in found.items()}
            samples += samples_of(self.name, name, rows, aggregation)
        for name, group in loaded["groups"].items():
            scores |= self._group_scores(name, group, scores, results)
        cut_short = [truncated_score(self.name, [cut for _, cut in thoughts])] if any(t for t, _ in thoughts) else []
        return TaskResult([*scores.values(), *cut_short], samples)

    def _require_template(self, model: Any) -> None:
        if self.chat_template and not getattr(model.tokenizer, "chat_template", None):
            raise WinnowError(f"{self.name}: chat_template=true, but the model's tokenizer has no chat template")

    def _filed(self, score: Score, task: Any, aggregation: Mapping[str, Any]) -> Score:
        """The score with its kind, by what lm-eval's task asks for, and its domain."""
        aggregate = aggregation.get(score.metric.partition(",")[0])
        if task.get_config("output_type") == "generate_until":
            kind = "generative"
        else:
            kind = "perplexity" if is_perplexity(aggregate) else "choice"
        return replace(score, kind=kind, domain=self._domain_of(score.part))

    def _domain_of(self, name: str) -> str:
        return self.domains.get(name) or self.domain or domain_of(name)

    def _load(self) -> Any:
        """lm-eval's task and group objects. Raises WinnowError."""
        manager = _task_manager(self.include_path)
        for name in self.tasks:
            if name not in manager.task_index and not Path(name).is_file():
                close = difflib.get_close_matches(name, manager.all_tasks)
                advice = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
                raise WinnowError(f"{self.name}: lm-eval has no task '{name}': {advice}")
        try:
            loaded = manager.load(list(self.tasks))
        except Exception as error:  # of datasets, the hub, YAML and the tasks' own code
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WinnowError(f"{self.name}: cannot load {', '.join(self.tasks)}: {reason}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise WinnowError(f"{self.name}: '{name}' runs what the model writes outside of winnow's sandbox")
        return loaded

    def _evaluate(self, model: Any, loaded: Any) -> Any:
        """As ``lm_eval.simple_evaluate``, which also asks git, pip and the machine about themselves every time."""
        from lm_eval import evaluate

        try:
            return evaluate(
                model,
                self._prepared(loaded),
                limit=self.limit,
                bootstrap_iters=0,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=True,
            )
        except AssertionError as error:  # how lm-eval says that a request does not fit into the model's length
            reason = str(error).strip() or "a text to score is empty or longer than the model's max_length"
            raise WinnowError(f"{self.name}: {reason.splitlines()[0]}") from error

    def _prepared(self, loaded: Any) -> Any:
        """The tasks with their examples chosen, and every generator of chance at its start."""
        from lm_eval.utils import set_torch_seed

        seed = FIRST_SEED + self.seed
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", self._shots(task))
            task.set_fewshot_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        set_torch_seed(seed)
        return loaded

    def _require_finite(self, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        broken = sum(not all(map(math.isfinite, logprobs_of(row))) for row in rows)
        if broken:
            raise BrokenModel(
                f"{self.name}: log-likelihoods of {broken} of {len(rows)} items of {task} are not finite; check the "
                "weights for NaN"
            )

    def _scores(
        self, task: str, rows: Sequence[Mapping[str, Any]], aggregation: Mapping[str, Any], results: Any
    ) -> dict[tuple[str, str], Score]:
        """{(task, "metric,filter"): score} of one task."""
        from lm_eval.api.metrics import mean

        values = defaultdict(list)
        for row in rows:
            for metric in row["metrics"]:
                values[(metric, row["filter"])].append(row[metric])
        scores = {}
        for (metric, filter_name), of_metric in values.items():
            key = f"{metric},{filter_name}"
            value = float(results["results"][task][key])
            low, high = interval_of(aggregation.get(metric, mean), of_metric, self.seed)
            better = higher_is_better(results, task, metric)
            named = metric_name(metric, filter_name)
            scores[(task, key)] = Score(self.name, named, value, len(of_metric), low, high, task, better)
        return scores

    def _group_scores(
        self, name: str, group: Any, scores: Mapping[tuple[str, str], Score], results: Any
    ) -> dict[tuple[str, str], Score]:
        """The scores of a group that averages its tasks; none for one that only lists them."""
        found = {}
        members = [task.task_name for task in group.get_all_tasks()]
        for config in group.aggregate_metric_list or ():
            for key, value in results["results"][name].items():
                metric, _, filter_name = key.partition(",")
                if metric != config.metric or not filter_name:
                    continue
                having = [task for task in members if (task, key) in scores]
                parts = [scores[(task, key)] for task in having]
                sizes = [results["results"][task]["sample_len"] if config.weight_by_size else 1 for task in having]
                shares = np.array(sizes) / sum(sizes)
                low, high = (
                    float(np.linalg.norm(shares * [getattr(part, end) - part.value for part in parts]))
                    for end in ("low", "high")
                )
                found[(name, key)] = Score(
                    self.name, metric_name(metric, filter_name), float(value), sum(part.n for part in parts),
                    float(value) - low, float(value) + high, name, higher_is_better(results, name, metric),
                    parts[0].kind, self._domain_of(name),
                )  # fmt: skip
        return found


@lru_cache(maxsize=4)
def _task_manager(include_path: str | None) -> Any:
    """Reading the 14,000 tasks of lm-eval takes long, so it is done once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_path is None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Meanwhile lm-eval logs errors only."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _answers_alone(model: Any) -> list[tuple[bool, bool]]:
    """From now on lm-eval's model gives texts without their thoughts, and nothing of one that ends inside its thought.
    The list fills with (holds a thought, ends inside it) of each text."""
    write = model.generate_until
    seen: list[tuple[bool, bool]] = []

    def generate_until(requests: Sequence[Any], **options: Any) -> list[str]:
        texts = zip(requests, write(requests, **options), strict=True)
        found = [split_thought(opened_thought(request.args[0]) + text) for request, text in texts]
        seen.extend((bool(thought) or cut, cut) for thought, _, cut in found)
        return ["" if cut else answer for _, answer, cut in found]

    model.generate_until = generate_until
    return seen


def _max_tokens(settings: Mapping[str, Any] | None) -> int:
    from lm_eval.models.utils import normalize_gen_kwargs

    from harness.backends.lm_eval import MAX_GEN_TOKS

    return int(normalize_gen_kwargs(dict(settings or {}), MAX_GEN_TOKS)["max_gen_toks"])
