"""How long the longest sequence is that a suite asks a model for: an engine reserves memory for it and no more."""

from collections.abc import Mapping
from pathlib import Path

from harness.backends.counter import counter_of
from harness.contracts.backend import TokenCounter
from harness.contracts.task import Need, SamplesTask, Task, TellsNeed
from harness.errors import WinnowError

# What a dry run takes for the longest sequence where it cannot count, in tokens: some documents of C4 are as long.
ASSUMED = 32_768


def longest_request(tasks: Mapping[str, Task], counter: TokenCounter) -> int | None:
    """In tokens, prompt and answer; None where a task does not tell.

    It may be more than the model takes, which backends cut. Raises WinnowError as the tasks do where they are run.
    """
    needs: dict[str, Need | None] = {}
    for task in tasks.values():
        needs[task.name] = _need(task, counter, needs)
        if needs[task.name] is None:
            return None
    return max((need.tokens for need in needs.values() if need), default=0) or None


def _need(task: Task, counter: TokenCounter, before: Mapping[str, Need | None]) -> Need | None:
    if isinstance(task, TellsNeed):
        return task.need(counter, before)
    return Need() if isinstance(task, SamplesTask) else None


def length_to_plan(tasks: Mapping[str, Task], folder: Path | None, limit: int) -> tuple[int, str]:
    """The longest sequence of a suite in tokens, at most the model's ``limit``, and where that is known from.

    It is counted where the model's tokenizer lies in ``folder`` and the items can be had, and assumed elsewhere.
    """
    if folder is None:
        return min(ASSUMED, limit), "assumed, since the tokenizer is not here"
    try:
        longest = longest_request(tasks, counter_of(folder))
    except WinnowError:
        return min(ASSUMED, limit), "assumed, since the items cannot be counted here"
    if longest is None:
        return limit, "the model's limit, since a task does not tell its need"
    return min(longest, limit), "the suite's longest" if longest < limit else "the model's limit"
