"""Layer diagnostics of a cell: they lie beside the records, in ``diagnostics/CELL.json``.

They need the plan and the original model only, so cells that are finished already get them as well.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness.apart import apart
from harness.calibration.streamed import open_for_pass
from harness.calibration.tokens import TokenSequence
from harness.cells.cell import Cell
from harness.cells.compress import how_to_open
from harness.contracts.alignment import align_channels
from harness.contracts.plan import CompressionPlan
from harness.devices import alone_on
from harness.files import write_files
from harness.layers.diagnose import diagnose, sample
from harness.records.store import RecordStore

log = logging.getLogger(__name__)

DIAGNOSTICS_VERSION = 3  # 2: left_out, pairs and sample; 3: the layer is the part of a score, no longer its domain


def diagnose_cell(
    config: DictConfig,
    cell: Cell,
    plan: Callable[[], CompressionPlan],
    sequences: Callable[[], Sequence[TokenSequence]],
    root: Path,
) -> None:
    """Writes ``diagnostics/CELL.json`` in ``root`` unless it is there; one process at a time works on it."""
    store, settings = RecordStore(root, "diagnostics"), config.diagnostics
    with store.claim(cell.id) as ours:
        if not ours:
            log.info("diagnostics of %s are there: skipped", cell.id)
            return
        found = apart(
            f"layer diagnostics ({cell.id})",
            _diagnosed,
            cell.model,
            plan(),
            sample(sequences(), settings.tokens),
            root / "cells" / cell.id / "diagnosed",
            cell.config,
        )
        told = {"version": DIAGNOSTICS_VERSION, "cell": cell.id, "corpus": config.calibration.name, **found}
        write_files({store.path(cell.id): json.dumps(told, indent=1).encode()})
        log.info("diagnostics: %s", store.path(cell.id))


def _diagnosed(
    model: Path, plan: CompressionPlan, sequences: Sequence[TokenSequence], scratch: Path, config: Mapping[str, Any]
) -> dict[str, Any]:
    with alone_on(config["model"]["device"]):
        return diagnose(
            model,
            plan,
            sequences,
            scratch,
            lambda folder: open_for_pass(folder, **how_to_open(config)),
            align_channels,
            config["diagnostics"]["pairs"],
            config["calibration"]["batch_size"],
        )
