"""A suite of tasks on a model: which task is asked what, with one model open at a time."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.apart import apart
from harness.backends.counter import counter_of
from harness.backends.once import Once
from harness.cells.cell import tasks_of
from harness.cells.check import make
from harness.cells.needs import longest_request
from harness.contracts.backend import Backend
from harness.contracts.record import Sample, Score
from harness.contracts.task import BesideTask, ModelTask, SamplesTask, Task, TaskResult, TwoModelsTask
from harness.errors import BrokenModel, WinnowError

log = logging.getLogger(__name__)


@dataclass
class Clock:
    """Seconds by stage, of all its rounds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


@dataclass(frozen=True)
class Evaluation:
    """What a suite gave, what the backend tells of itself, why a task could not measure a broken model, and what was
    not measured since the uncompressed model was left out."""

    scores: list[Score] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    def add(self, task: Task, result: TaskResult) -> None:
        """A score that does not say its kind or domain has those of its task."""
        self.scores.extend(
            replace(score, kind=score.kind or task.kind, domain=score.domain or task.domain) for score in result.scores
        )
        self.samples.extend(result.samples)
        self.engine.update(result.facts)

    @contextmanager
    def noting_broken(self, task: str) -> Iterator[None]:
        """A model whose numbers are not finite is a result, not a fault of the run: the record says so."""
        try:
            yield
        except BrokenModel as error:
            log.error("the model is broken: %s", error)
            self.broken[task] = str(error)


def evaluate(
    config: dict[str, Any],
    checkpoint: Path,
    clock: Clock,
    baseline: Sequence[Sample] | None = None,
    uncompressed: Path | None = None,
    unopened: str = "",
) -> Evaluation:
    """Every task of the suite on the model in ``checkpoint``; nothing is loaded for an empty suite.

    ``baseline`` holds the samples of the model in ``uncompressed``; both are None where this is that model. Two models
    are never open at once: what a task's ``observe`` saw is compared when the uncompressed model has taken over. What
    two tasks ask alike is written once (``Once``); the engine's facts say by task how many answers were there already.
    ``unopened`` is the setting by which the uncompressed model is not opened: what needs it open is not measured then,
    and without ``baseline`` neither is what compares with its samples.
    """
    done = Evaluation()
    if not config["suite"]["tasks"]:
        return done
    tasks = tasks_of(config)
    observed: dict[str, tuple[TwoModelsTask, Any]] = {}

    def compare(backend: Backend) -> None:
        for name, (task, seen) in observed.items():
            with clock.stage(f"compare_{name}"), done.noting_broken(name):
                done.add(task, task.compare(seen, backend))

    config = _with_room(config, checkpoint, tasks, clock)
    with clock.stage("load"):
        backend = _open(config, checkpoint)
    with closing(backend):
        once, shared = Once(backend), {}
        for name, task in tasks.items():
            before = once.shared
            with clock.stage(f"task_{name}"), done.noting_broken(name):
                match task:
                    case TwoModelsTask() if unopened:
                        done.not_measured[name] = f"it needs the uncompressed model, which {unopened} does not open"
                    case TwoModelsTask():
                        observed[name] = task, task.observe(backend, done.samples, baseline)
                    case BesideTask():
                        if unopened and baseline is None:
                            done.not_measured[name] = f"nothing beside the uncompressed model, left out by {unopened}"
                        done.add(task, task.run_against(backend, done.samples, baseline))
                    case SamplesTask():
                        done.add(task, task.run_on(done.samples))
                    case ModelTask():
                        done.add(task, task.run(backend))
                    case _:
                        raise WinnowError(
                            f"suite.tasks.{name}: {type(task).__name__} asks nothing: it has none of run, run_on, "
                            "run_against, and observe with compare"
                        )
            if once.shared > before:
                shared[name] = once.shared - before
        if uncompressed is None:
            compare(backend)
        clock.seconds |= {what: round(seconds, 3) for what, seconds in backend.seconds.items()}
        done.engine.update(backend.facts | ({"answers_shared": shared} if shared else {}))
    if uncompressed is not None and observed:
        with clock.stage("load_baseline"):
            backend = _open(config, uncompressed)
        with closing(backend):
            compare(backend)
    return done


def evaluate_apart(
    what: str,
    config: dict[str, Any],
    checkpoint: Path,
    clock: Clock,
    baseline: Sequence[Sample] | None = None,
    uncompressed: Path | None = None,
    unopened: str = "",
) -> Evaluation:
    """``evaluate`` in a process of its own; ``what`` names it where that is killed."""
    if not config["suite"]["tasks"]:
        return Evaluation()
    done, seconds = apart(what, _evaluate_and_time, config, checkpoint, baseline, uncompressed, unopened)
    clock.seconds |= seconds
    return done


def _evaluate_and_time(
    config: dict[str, Any],
    checkpoint: Path,
    baseline: Sequence[Sample] | None,
    uncompressed: Path | None,
    unopened: str,
) -> tuple[Evaluation, dict[str, float]]:
    clock = Clock()
    return evaluate(config, checkpoint, clock, baseline, uncompressed, unopened), clock.seconds


def _with_room(config: dict[str, Any], checkpoint: Path, tasks: dict[str, Task], clock: Clock) -> dict[str, Any]:
    """The configuration with ``longest`` for a backend that reserves memory by it (transformers does not), unless a
    length was asked for. It is the same for both models of a cell, whose tokenizer is one."""
    backend = config["backend"]
    if backend["name"] != "vllm" or backend["open"].get("max_length"):
        return config
    with clock.stage("lengths"):
        longest = longest_request(tasks, counter_of(checkpoint))
    return config | {"backend": backend | {"open": backend["open"] | {"longest": longest}}}


def _open(config: dict[str, Any], checkpoint: Path) -> Backend:
    model = config["model"]
    given = {"folder": str(checkpoint), "dtype": model["dtype"], "device": model["device"]}
    return make(config["backend"]["open"], "backend.open", Backend, **given)
