"""Dynamic expert skipping: at inference a token leaves out those of its top-k experts that hardly count for it.

Of a token's gate values g, those below beta times the largest become 0, and the rest is scaled so that the sum stays
what it was. In top-2 models whose gate values add up to 1 that is the rule of Lu et al. 2024 ("Not All Experts are
Equal", section 3.3), and ``quantile`` 0.5 is their beta: the median over tokens of the second gate value divided by the
first. Beyond top-2 all ratios of a token count, each of the k - 1 to its largest gate value.

It changes what is computed, not what is stored: config.json gets a section that ``load_model`` heeds. Here a skipped
expert is still run, with gate value 0: the share of evaluations that could be saved is measured, time is not.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.checkpoints.config import read_config
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.moe_block import moe_block
from harness.files import write_files

SECTION = "winnow_skip"
BINS = 10_000  # of the ratios, from 0 to 1: the precision of a calibrated beta


@dataclass(frozen=True)
class Threshold:
    """``beta`` of one layer, and the ``share`` of its expert evaluations that it saves on the calibration corpus."""

    beta: float
    share: float


@dataclass(frozen=True)
class Skip:
    """``quantile``: in every layer beta is such that this share of the ratios is below it; or one ``beta`` for all.

    Raises WinnowError where neither or both are given, or one is outside [0, 1].
    """

    name: str
    quantile: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.quantile, self.beta) if value is not None]
        if len(given) != 1 or isinstance(given[0], str) or not 0 <= given[0] <= 1:
            raise WinnowError(
                f"skip={self.name} needs a skip.quantile or a skip.beta from 0 to 1, not quantile={self.quantile} and "
                f"beta={self.beta}"
            )

    @property
    def label(self) -> str:
        return f"{self.name}-{self.beta if self.quantile is None else self.quantile:g}"

    def check(self, top_k: int) -> None:
        """Raises WinnowError where there is nothing to skip."""
        if top_k < 2:
            raise WinnowError(f"skip={self.name} needs a model with top-k of at least 2: this one has top-{top_k}")

    def threshold(self, counts: np.ndarray, top_k: int) -> Threshold:
        """From the ``counts`` (BINS,) of a layer's ratios, k - 1 a token."""
        below = np.concatenate([[0], counts.cumsum()])  # below[b]: ratios under b / BINS
        beta = self.beta
        if beta is None:
            assert self.quantile is not None
            beta = float(np.searchsorted(below, self.quantile * below[-1])) / BINS
        skipped = below[min(int(beta * BINS + 0.5), BINS)]
        return Threshold(beta, float(skipped / below[-1] * (top_k - 1) / top_k))


def count_ratios(gates: Tensor) -> Tensor:
    """(BINS,): how many of the k - 1 smaller gate values of each token, relative to its largest, fall into each bin."""
    ordered = gates.float().sort(dim=-1, descending=True).values
    ratios = (ordered[:, 1:] / ordered[:, :1]).nan_to_num(0.0).reshape(-1)
    return torch.bincount((ratios * BINS).long().clamp(0, BINS - 1), minlength=BINS)


def write_thresholds(folder: Path, thresholds: Mapping[int, Threshold]) -> None:
    """Have ``load_model`` skip experts of the checkpoint in ``folder``."""
    betas = {str(layer): threshold.beta for layer, threshold in thresholds.items()}
    config = read_config(folder) | {SECTION: {"version": 1, "beta": betas}}
    write_files({folder / "config.json": (json.dumps(config, indent=2) + "\n").encode()})


def read_betas(config: Mapping[str, Any]) -> dict[int, float]:
    """Layer -> beta; empty where nothing is skipped. Raises WinnowError for a section that cannot be read."""
    section = config.get(SECTION)
    if section is None:
        return {}
    try:
        if section["version"] != 1:
            raise WinnowError(f"config.json: skipping version {section['version']} is newer than this winnow")
        return {int(layer): float(beta) for layer, beta in section["beta"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WinnowError(f"config.json does not say how experts are skipped: {error!r}") from error


def install(model: nn.Module, family: Family, betas: Mapping[int, float]) -> None:
    """Have the routers of these layers answer with the gate values of skipped experts at 0."""
    place = family.router_output.index("gates")
    for layer, beta in betas.items():
        moe_block(model, family, layer).router.register_forward_hook(partial(_skip, place, beta))


def _skip(place: int, beta: float, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    gates = output[place]
    left = gates.masked_fill(gates < beta * gates.amax(dim=-1, keepdim=True), 0.0)
    scaled = left * (gates.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True))
    return (*output[:place], scaled.nan_to_num(0.0), *output[place + 1 :])
