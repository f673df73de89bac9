"""Is there room on the disk for the checkpoints of a sweep? ``keep_checkpoint=auto`` asks when a cell is scored."""

import logging
import os
import shutil
from pathlib import Path

from harness.checkpoints.weight_files import weight_files

log = logging.getLogger(__name__)

CELLS_LEFT = "WINNOW_CELLS_LEFT"  # environment: how many cells a sweep has to do besides the one at work here


def keeps_checkpoint(setting: bool | str, model: Path, folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` stays, now that its cell is scored.

    "auto": where the disk would hold one as large as ``model``, the uncompressed one, for each cell that this sweep has
    left. A single cell keeps its own.
    """
    if setting != "auto":
        return bool(setting)
    left = int(os.environ.get(CELLS_LEFT, 0))
    needed = left * sum(path.stat().st_size for path in weight_files(model).files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        log.info(
            "the checkpoint goes, now that it is scored: the sweep may need %.1f GB more and %.1f GB are free "
            "(keep_checkpoint=true keeps all)", needed / 1e9, free / 1e9,
        )  # fmt: skip
    return needed <= free
