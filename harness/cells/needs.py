"""How long the longest sequence is that a suite asks a model for: an engine reserves memory for it and no more."""

from collections.abc import Mapping

from harness.contracts.backend import TokenCounter
from harness.contracts.task import Need, SamplesTask, Task, TellsNeed


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
