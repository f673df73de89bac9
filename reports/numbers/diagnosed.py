"""``diagnostics/CELL.json`` as ``diagnostics=layers`` leaves it (``harness.layers.diagnose``): read, and checked."""

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from harness.contracts.record import Score
from harness.errors import WinnowError
from harness.records.old import upgraded_score


class _Layer(TypedDict):
    """What every layer has; of the rest, what is read where it is there."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    measured_error: list[float]
    spread_ratio: list[float]
    spread_before: float
    spread_after: float
    explained_before: list[float]
    explained_after: list[float]
    load_entropy_before: float
    load_entropy_after: float
    singleton_share: float
    largest_group: int
    rows: int
    kept: list[int] | None


class _Theory(_Layer, total=False):
    predicted_error: list[float]
    left_out: dict[str, list[float]]
    pairs: list[list[int]]
    distance: list[float]
    aligned_distance: list[float]
    overlap: list[float]
    average_distance: list[float]
    average_aligned_distance: list[float]
    average_overlap: list[float]


class _Diagnosed(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    tokens: int
    layers: dict[str, _Theory]
    scores: list[Score]


_SCHEMA = TypeAdapter(_Diagnosed)


def read_diagnostics(folder: Path, cell: str) -> dict[str, Any] | None:
    """What is known of the layers of a cell; None where it was not looked at.

    Raises WinnowError where the file is damaged.
    """
    path = folder / "diagnostics" / f"{cell}.json"
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        told = {**data, "scores": [upgraded_score(one) for one in data["scores"]]}
        # As JSON, so that a text is not taken for a number.
        return dict(_SCHEMA.validate_json(json.dumps(told), strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WinnowError(f"{path} is damaged: delete it and run its cell with diagnostics=layers again") from error
