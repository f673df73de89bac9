"""What a tracker does with a finished cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from harness.contracts.record import Record, Sample


class Tracker(Protocol):
    def log_cell(self, record: Record, samples: Sequence[Sample], root: Path, folder: Path | None = None) -> None:
        """Sends one finished cell. ``root`` is the output folder of its sweep, ``folder`` has the files of the cell."""
        ...
