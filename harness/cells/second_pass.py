"""A method that looks at the experts it has chosen a second time, before its decision is final."""

from collections.abc import Callable
from pathlib import Path

from harness.calibration.second_pass import look_again
from harness.calibration.streamed import Model
from harness.cells.cell import Cell
from harness.cells.evaluate import Clock
from harness.checkpoints.config import read_config
from harness.contracts.method import Decision, Method
from harness.contracts.second_pass import second_pass
from harness.contracts.statistics import Statistics
from harness.families.table import family_of


def looked_again(
    cell: Cell,
    method: Method,
    statistics: Statistics,
    decision: Decision,
    open_model: Callable[[], Model],
    fingerprint: str,
    root: Path,
    clock: Clock,
) -> Decision:
    """The final decision of ``method``: ``decision`` itself, or what a second pass over the corpus makes of it.

    ``open_model`` opens what ``fingerprint`` stands for, one layer at a time, so that no more than the moments of one
    layer are in memory; they are kept in ``root``/calibration/moments. Raises WinnowError as pass and method do.
    """
    asking = second_pass(method)
    looks = {} if asking is None else asking.looks_again_at(statistics, decision)
    if asking is None or not looks:
        return decision
    made_from = {"model": fingerprint, "dtype": str(cell.config["model"]["dtype"])}
    family, size = family_of(read_config(cell.model)), cell.config["calibration"]["batch_size"]
    with clock.stage("second pass"):
        folder = root / "calibration" / "moments"
        seen = look_again(open_model, family, cell.sequences, looks, folder, made_from, size)
        return asking.finish(statistics, decision, seen)
