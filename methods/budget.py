"""How many experts a compression ratio leaves: exact rationals, the same for pruning and merging."""

import math
from dataclasses import replace
from fractions import Fraction

from harness.contracts.shape import MoeShape
from harness.errors import WinnowError


def parse_ratio(ratio: str | float | Fraction) -> Fraction:
    """The ratio as it is written: 0.55 is 11/20, not the binary float next to it; "1/3" works too.

    With binary floats int(60 * (1 - 0.55)) is 26 instead of 27 (a fault of the REAP repository).
    Raises WinnowError outside [0, 1).
    """
    try:
        exact = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio).strip())
    except (ValueError, ZeroDivisionError):
        raise WinnowError(
            f"ratio '{ratio}' is not a number: give a decimal or a fraction, such as 0.25 or 1/3"
        ) from None
    if not 0 <= exact < 1:
        raise WinnowError(f"ratio {ratio} is outside [0, 1): it is the share of the experts that goes, such as 0.25")
    return exact


def as_decimal(removed: int, num_experts: int) -> str:
    """A short decimal ratio that removes exactly ``removed`` of ``num_experts`` experts."""
    share = Fraction(removed, num_experts)
    text = as_written(share)
    digits = 1
    while "/" in text:
        rounded_up = Fraction(math.ceil(share * 10**digits), 10**digits)
        if math.floor(rounded_up * num_experts) == removed:
            return as_written(rounded_up, digits)
        digits += 1
    return text


def as_written(ratio: Fraction, digits: int = 4) -> str:
    """The ratio as a decimal where ``digits`` digits write it exactly, otherwise as a fraction."""
    if (ratio * 10**digits).denominator != 1:
        return str(ratio)
    return f"{float(ratio):.{digits}f}".rstrip("0").rstrip(".")


def kept_experts(shape: MoeShape, ratio: str | float | Fraction) -> int:
    """E - floor(E * ratio): experts (or groups) left in each layer.

    Raises WinnowError for a ratio outside [0, 1), for fewer experts than top-k or the router rows that a layer can run
    with, and, where the router is group-limited, for a number that does not divide evenly among the router groups.
    """
    exact = parse_ratio(ratio)
    num_experts, top_k, n_group = shape.num_experts, shape.top_k, shape.n_group
    fewest = max(top_k, shape.fewest_rows)
    if num_experts % n_group or fewest > num_experts:
        raise WinnowError(
            f"the model's config contradicts itself: {num_experts} experts, top-{top_k}, n_group = {n_group}"
        )
    kept = num_experts - math.floor(num_experts * exact)
    leaves = f"ratio {as_written(exact)} leaves {kept} of {num_experts} experts"
    # Only multiples of n_group can be shared evenly by the router groups.
    fitting = [k for k in range(fewest, num_experts + 1) if k % n_group == 0]
    if kept < fewest:
        removed = num_experts - fitting[0]
        needed = f"top-k = {top_k}" if kept < top_k else f"the {fewest} that the router needs"
        raise WinnowError(
            f"{leaves}, fewer than {needed}; the largest ratio that works is "
            f"{as_decimal(removed, num_experts)} ({removed} of {num_experts} removed)"
            + ("; or lower top-k with them: lower_top_k=true" if kept < top_k and n_group == 1 else "")
        )
    if kept not in fitting:
        nearest = [k for k in fitting if k > kept][:1] + [k for k in fitting if k < kept][-1:]
        ratios = " and ".join(as_decimal(num_experts - k, num_experts) for k in nearest)
        raise WinnowError(
            f"{leaves}, which the router's {n_group} groups cannot share evenly; the nearest ratios that fit: {ratios}"
        )
    return kept


def checked_ratio(shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
    """The exact ratio, for methods that merge: all router rows stay, so their fewest number sets no bound.

    Raises WinnowError, as ``kept_experts`` does, where the ratio does not fit the model.
    """
    kept_experts(replace(shape, fewest_rows=0), ratio)
    return parse_ratio(ratio)


def check_any_number(option: str, instead: str, shape: MoeShape) -> None:
    """Raises WinnowError where a layer cannot run with every number of experts from top-k on, as ``option`` may leave.

    ``instead`` is the option that fits.
    """
    if shape.n_group > 1:
        raise WinnowError(f"{option} does not fit a group-limited router; use {instead}")
    if shape.fewest_rows > shape.top_k:
        raise WinnowError(
            f"{option} may leave top-k = {shape.top_k} experts in a layer, but the router needs {shape.fewest_rows}; "
            f"use {instead}"
        )
