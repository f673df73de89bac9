"""Least squares with a ridge that draws to what was there before, from sums alone; float64."""

import torch
from torch import Tensor

from harness.errors import WinnowError

_ROWS = 8192  # that are float64 at once


def ridge(gram: Tensor, cross: Tensor, prior: Tensor, alpha: float) -> Tensor:
    """(H, d): the V that minimises sum |y - V z|^2 + lambda |V - prior|^2, with lambda = alpha * trace(gram) / d.

    ``gram`` (d, d) is the sum of z z^T, ``cross`` (H, d) that of y z^T. ``prior`` (H, d) stays where ``gram`` is 0.
    V = prior + (cross - prior gram) (gram + lambda I)^-1 (methods_3.md, 1.2). Raises WinnowError where the sums are not
    finite, and where they are singular and ``alpha`` is too small to mend it.
    """
    return prior + step(factor(gram, alpha), cross - prior @ gram)


def factor(gram: Tensor, alpha: float) -> Tensor | None:
    """The lower Cholesky factor of gram + lambda I; None where ``gram`` is 0. Raises WinnowError as ``ridge`` does."""
    if not torch.isfinite(gram).all():
        raise WinnowError("its activations are NaN or infinite: check the model's weights, or set model.dtype=float32")
    mean = gram.diagonal().mean()
    if mean <= 0:
        return None
    damped = gram + alpha * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise WinnowError(f"the sums are singular with alpha={alpha:g}: set it higher, such as 0.01")
    return lower


def step(lower: Tensor | None, gradient: Tensor) -> Tensor:
    """``gradient`` (H, d) times the inverse of what ``factor`` was given; 0 where there is no factor.

    Raises WinnowError where it is not finite.
    """
    if lower is None:
        return torch.zeros_like(gradient)
    if not torch.isfinite(gradient).all():
        raise WinnowError("its outputs are NaN or infinite: check the model's weights, or set model.dtype=float32")
    return torch.cholesky_solve(gradient.T, lower).T


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """sum_t |wanted_t - found_t|^2 / sum_t |wanted_t|^2 of (T, H); 0 where both sums are."""
    lost = total = 0.0
    for one, other in zip(found.split(_ROWS), wanted.split(_ROWS), strict=True):
        lost += float((other.double() - one.double()).square().sum())
        total += float(other.double().square().sum())
    return lost / total if total else lost
