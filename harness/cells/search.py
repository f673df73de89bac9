"""A budget that is searched on the model: what it costs, told beforehand, and the search itself, which goes on where it
was stopped."""

import logging
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from harness.calibration.overlap import TOO_LARGE, Comparison, remembered, spaced
from harness.calibration.streamed import Model, is_streamed
from harness.cells.cell import Cell
from harness.cells.evaluate import Clock
from harness.checkpoints.config import read_config
from harness.contracts.method import Method, SearchReport
from harness.contracts.search import Search, searching
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from harness.families.table import family_of

log = logging.getLogger(__name__)


def cost(search: Search, layers: int, sequences: int) -> str:
    """In forwards of the text: the intact model's, and one for each budget that may be looked at."""
    return f"at most {1 + search.evaluations(layers):,} forwards of {sequences:,} sequences"


def check_whole(cell: Cell, opened: Mapping[str, Any]) -> None:
    """Raises WinnowError where a budget is to be searched on a model that ``opened`` reads one layer at a time."""
    if searching(cell.method) is not None and is_streamed(cell.model, **opened):
        raise WinnowError(TOO_LARGE)


def with_budget(
    cell: Cell, statistics: Statistics, ratio: Fraction, open_model: Callable[[], Model], root: Path, clock: Clock
) -> tuple[Method, SearchReport | None]:
    """The method that decides: the cell's own, or what it is once its budget has been searched for.

    What has been looked at is kept in ``root``/calibration/searches. Raises WinnowError as the method does, and where
    the model is not whole in memory or its numbers are not finite.
    """
    asking = searching(cell.method)
    if asking is None:
        return cell.method, None
    family, batch_size = family_of(read_config(cell.model)), cell.config["calibration"]["batch_size"]
    text = spaced(cell.sequences, asking.search.samples)
    tokens = sum(len(sequence.input_ids) for sequence in text)
    log.info("search: %s (%s tokens)", cost(asking.search, cell.shape.layers, len(text)), f"{tokens:,}")
    named = {name: str(cell.config["model"][name]) for name in ("dtype", "device")}
    of = {"model": cell.contents["model"], **named, "batch_size": batch_size}

    def comparison() -> Comparison:
        return Comparison(open_model(), family, text, batch_size)

    evaluations = asking.search.evaluations(cell.shape.layers)
    folder = root / "calibration" / "searches"
    with clock.stage("search"), remembered(comparison, folder, of, text, evaluations) as overlap:
        method, found = asking.with_budget(statistics, cell.shape, ratio, cell.config["seed"], overlap)
    uniform = f"{found.uniform:.6f} with as many experts in every layer"
    log.info("search: overlap %.6f, %s, after %d budgets", found.fitness, uniform, found.evaluations)
    return method, found
