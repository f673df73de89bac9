"""What is said where the uncompressed model was left out of a sweep, or evaluated elsewhere."""

from collections.abc import Sequence

from harness.contracts.record import Record
from reports.numbers.load import Panel, Row

_LEFT_OUT = "skip"  # as the setting ``baseline`` says it


def absent(panel: Panel) -> str:
    """A sentence where the panel has no record of the uncompressed model; else nothing."""
    if panel.baseline is not None:
        return ""
    why = "left out by baseline=skip" if any(map(_leaves_out, panel.records())) else "not kept, or not evaluated yet"
    return f"There is no record of the uncompressed model ({why}): it has no row, and no differences are shown."


def elsewhere(panel: Panel) -> str:
    """A sentence where the uncompressed model's record was taken from another output folder; else nothing."""
    record = panel.baseline_record()
    if record is None or not record.taken_from:
        return ""
    return f"The uncompressed model was evaluated elsewhere: its record is taken from {record.taken_from}."


def unmeasured(rows: Sequence[Row]) -> list[str]:
    """What cells have no score of, since the uncompressed model was left out: ``reap at 0.5: drift (why)``."""
    told = (
        f"{row.method} at {row.ratio:g}: {task} ({why})"
        for row in rows
        for record in row.records
        for task, why in record.not_measured.items()
    )
    return list(dict.fromkeys(told))


def _leaves_out(record: Record) -> bool:
    return record.config.get("baseline") == _LEFT_OUT
