"""What a task asks of a backend, and what it gives back."""

from dataclasses import dataclass
from typing import Protocol

from harness.contracts.backend import Backend
from harness.contracts.record import Sample, Score


@dataclass(frozen=True)
class TaskResult:
    scores: list[Score]
    samples: list[Sample]


class Task(Protocol):
    """Tasks that need more than the model have, instead of ``run``:

    - ``run_on(samples)`` scores what the tasks before it wrote,
    - ``run_against(backend, samples, baseline)`` sees that and the samples of the uncompressed model (None where this
      is the uncompressed model, empty where none are kept),
    - ``observe(backend, samples, baseline)`` sees the same, and what it returns goes to ``compare(seen, backend)`` with
      the uncompressed model's backend: two models are measured against each other, and never open at once.
    """

    name: str

    def run(self, backend: Backend) -> TaskResult: ...
