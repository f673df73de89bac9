"""Channel alignment: an expert computes the same whatever the order of its channels, an average does not."""

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError


def align_channels(reference: ExpertWeights, member: ExpertWeights) -> tuple[int, ...]:
    """The order p of ``member``'s channels closest to ``reference``: channel c takes the old channel p[c].

    Minimises the sum over channels of the squared L2 distance between gate rows, up rows and down columns
    (M-SMoE; REAP repository). The squared norms add up to the same in every order, so this maximises the
    inner products, exactly by the Hungarian algorithm, in float64 (the REAP repository rounds the costs to
    float16, and so misses the optimum in some cases). Raises WinnowError where a weight is not finite.
    """
    gate, up, down = (m.astype(np.float64) for m in (reference.gate, reference.up, reference.down))
    similarity = gate @ member.gate.T + up @ member.up.T + down.T @ member.down
    if not np.isfinite(similarity).all():
        raise WinnowError("channels cannot be aligned: an expert's weights are NaN or infinite; check the checkpoint")
    _, order = linear_sum_assignment(similarity, maximize=True)
    return tuple(int(channel) for channel in order)
