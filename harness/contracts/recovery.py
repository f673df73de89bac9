"""Recovery from calibration text alone, as settings ask for it: a refit of down projections, a recalibrated router."""

from dataclasses import dataclass, fields
from typing import Any

from harness.errors import WinnowError

OBJECTIVES = ("routed", "joint", "all_tokens")


@dataclass(frozen=True)
class Fit:
    """Down projections by least squares, with a ridge of ``alpha`` times the mean of the Gram matrix's diagonal that
    draws them to what they were.

    ``name`` is the objective (``harness.refit``). ``tokens`` of the corpus are fitted to at most, in whole sequences;
    ``joint`` goes over a layer's experts at most ``sweeps`` times. Raises WinnowError for an unknown objective.
    """

    name: str
    alpha: float = 0.01
    tokens: int = 131_072
    sweeps: int = 20

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise WinnowError(f"unknown refit '{self.name}': choose none, {', '.join(OBJECTIVES)}")

    @property
    def label(self) -> str:
        return _label(self, "refit")


@dataclass(frozen=True)
class Recalibration:
    """Router rows by least squares on what the compressed model gives the router, with a ridge as of ``Fit``."""

    name: str
    alpha: float = 0.01
    tokens: int = 131_072

    @property
    def label(self) -> str:
        return _label(self, "router")


def _label(asked: Fit | Recalibration, what: str) -> str:
    """Such as "routed-refit", and whatever is not as it is by default: "joint-refit-alpha0.001-sweeps5"."""
    told = [
        f"{field.name}{getattr(asked, field.name):g}"
        for field in fields(asked)
        if field.name != "name" and getattr(asked, field.name) != field.default
    ]
    return "-".join([asked.name, what, *told])


def fit_of(method: Any) -> Fit | None:
    """The refit that is part of the method itself, if any."""
    found: Fit | None = getattr(method, "fit", None)
    return found
