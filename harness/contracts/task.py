"""What a task is: how it asks a model, and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from harness.contracts.backend import Backend, TokenCounter
from harness.contracts.record import Sample, Score


@dataclass(frozen=True)
class TaskResult:
    """``facts``: what a record should say of how it was measured, such as the layers of the sandbox in force."""

    scores: list[Score]
    samples: list[Sample]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """The longest sequence, in tokens, that a task asks a model for: prompt and answer, or what it scores.

    ``written``: how many of them belong to the answer of a sample that keeps its prompt; 0 where none does.
    """

    tokens: int = 0
    written: int = 0


@runtime_checkable
class TellsNeed(Protocol):
    """A task that knows, before the model is there, how long the longest sequence is that it will ask it for."""

    def need(self, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need | None:
        """None where it is unknown. ``before`` has what the tasks before it need, by the name in their samples.

        A sequence that is longer than ``counter.max_length`` may be told as it is: backends cut it.
        """
        ...


class Task(Protocol):
    """What every task has. It is one of the four kinds below, by what it needs.

    ``kind`` and ``domain`` are those of its scores (``harness.contracts.record.Score``) unless a score says its own; a
    suite may give another ``domain``. ``version`` is raised by whoever changes what the task scores: it is part of a
    cell's id, so that old and new results are not taken for one another.
    """

    name: str
    domain: str
    kind: ClassVar[str]
    version: ClassVar[int]

    def tokens_to_write(self) -> int:
        """How many tokens the task generates at most; 0 for one that writes nothing."""
        return 0

    def item_texts(self) -> list[str]:
        """What a model that has seen the items would know, a text each; empty where they are not published."""
        return []

    def items_content(self) -> Any:
        """The items as they are scored, as plain data, of which a cell's id takes a hash; None where they come from
        the task's own code, whose ``version`` stands for them."""
        return None


@runtime_checkable
class ModelTask(Task, Protocol):
    """Asks the model."""

    def run(self, backend: Backend) -> TaskResult: ...


@runtime_checkable
class SamplesTask(Task, Protocol):
    """Scores the samples of the tasks before it."""

    def run_on(self, samples: Sequence[Sample]) -> TaskResult: ...


@runtime_checkable
class BesideTask(Task, Protocol):
    """Asks the model, and sees the samples so far and those of the uncompressed model: None where this is that model or
    there is no record of it, empty where none are kept."""

    def run_against(
        self, backend: Backend, samples: Sequence[Sample], baseline: Sequence[Sample] | None
    ) -> TaskResult: ...


@runtime_checkable
class TwoModelsTask(Task, Protocol):
    """Measures two models against each other that are never open at once: what ``observe`` returns of the compressed
    one goes to ``compare`` with the backend of the uncompressed one."""

    def observe(self, backend: Backend, samples: Sequence[Sample], baseline: Sequence[Sample] | None) -> Any: ...

    def compare(self, seen: Any, backend: Backend) -> TaskResult: ...
