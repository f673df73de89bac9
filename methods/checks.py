"""Checks that all methods make on their options and statistics."""

import warnings
from collections.abc import Iterable

import numpy as np

from harness.contracts.statistics import Statistics
from harness.errors import WinnowError


def check_option(method: str, option: str, value: object, known: Iterable[object]) -> None:
    """Raises WinnowError that lists the known values where ``value`` is none of them."""
    known = list(known)
    if value not in known:
        raise WinnowError(f"method '{method}': unknown {option} '{value}'; known: {', '.join(map(str, known))}")


def finite(values: np.ndarray, what: str, layer: int, num_experts: int) -> np.ndarray:
    """``values`` as float64, or as they are where they are bool.

    Raises WinnowError where a row per expert is missing or is not finite.
    """
    values = np.asarray(values)
    values = values if values.dtype == bool else values.astype(np.float64, copy=False)
    if values.ndim == 0 or values.shape[0] != num_experts:
        raise WinnowError(
            f"{what} of layer {layer} has shape {values.shape}, not one row for each of {num_experts} experts"
        )
    bad = np.flatnonzero(~np.isfinite(values.reshape(num_experts, -1)).all(axis=1))
    if len(bad):
        raise WinnowError(
            f"{what} of layer {layer} is NaN or infinite for expert(s) {', '.join(map(str, bad))}: "
            "check the model's weights and calibrate again (float32 if an activation overflows)"
        )
    return values


def statistic(statistics: Statistics, layer: int, name: str) -> np.ndarray:
    """The statistic as float64 (or bool). Raises WinnowError that names layer and statistic if it is not finite."""
    return finite(statistics.get(layer, name), f"statistic '{name}'", layer, statistics.experts_in(layer))


def warn_of_never_routed(statistics: Statistics, consequence: str) -> None:
    """One warning with the number of experts that no calibration token was routed to, if there are any."""
    counts = {layer: int((statistic(statistics, layer, "frequency") == 0).sum()) for layer in sorted(statistics.layers)}
    never = sum(counts.values())
    if never:
        where = ", ".join(str(layer) for layer, count in counts.items() if count)
        warnings.warn(
            f"{never} of {sum(map(statistics.experts_in, counts))} experts were never routed to "
            f"during calibration (layers {where}): {consequence}",
            stacklevel=3,
        )
