"""Orders of channels (M-SMoE), by matrix products on the device of calibration, and kept for the next ratio and corpus.

Similarities of channels are computed in float32. Their rounding is bounded, and ``proven_best`` tells whether the best
order is certain all the same; the few values that decide it are computed once more in float64. What is not certain is
left to ``align_channels``, and so every order is the one that it finds.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import progress
from harness.calibration.archive import Damaged, read_archive, write_archive
from harness.calibration.assignment import proven_best
from harness.claims import claimed
from harness.contracts.alignment import align_channels
from harness.contracts.statistics import Align, ExpertWeights
from harness.files import sweep

log = logging.getLogger(__name__)

_BLOCK = 1024  # products that are added up in float32; their sums in float64
_BYTES = 2**30  # of weights and similarities at once
_EXACT_BYTES = {"cpu": 2**18, "cuda": 2**28}  # of float64 at once: what a processor keeps close is not fetched again
_SINGLE, _DOUBLE = 2.0**-24, 2.0**-53  # largest relative error of one rounding
_TINY = 2.0**-126  # below it float32 may become 0

Order = tuple[int, ...]


def cached_aligner(folder: Path, weights: Callable[[int, int], ExpertWeights], device: torch.device) -> Align:
    """``Align`` by ``weights(layer, expert)``, whose results are kept in ``folder``, a file a layer.

    The folder is that of one model: what its weights are it has to say by its name. One process computes a layer's
    orders and the others wait for it. A damaged file is computed anew, with a warning.
    """

    def align(layer: int, pairs: Sequence[tuple[int, int]]) -> list[Order]:
        path = folder / f"{layer}.npz"
        known = _read(path)
        if any(pair not in known for pair in pairs):
            with claimed(path.with_suffix(".claim"), f"the channels of layer {layer}"):
                sweep(folder, f".{path.stem}.*.tmp")  # who holds the lock is alone
                known = _read(path)
                missing = [pair for pair in pairs if pair not in known]
                if missing:
                    new = aligned(partial(weights, layer), missing, device, f"aligning channels of layer {layer}")
                    known |= dict(zip(missing, new, strict=True))
                    _write(path, known)
        return [known[pair] for pair in pairs]

    return align


def aligned(
    weights: Callable[[int], ExpertWeights], pairs: Sequence[tuple[int, int]], device: torch.device, label: str = ""
) -> list[Order]:
    """Of each pair (reference, member) of a layer's experts what ``align_channels`` gives; ``label`` names the bar.

    Pairs of one reference that stand together are computed together. Where the device has no memory left, this goes on
    on the CPU, with a warning. Raises WinnowError where a weight is not finite.
    """
    found: list[Order] = []
    with progress.bar(label, len(pairs)) as bar:
        for reference, members in _by_reference(pairs):
            try:
                orders = _aligned_to(reference, members, weights, device)
            except torch.OutOfMemoryError:
                log.warning("no memory is left on %s: channels are aligned on the CPU", device)
                device = torch.device("cpu")
                orders = _aligned_to(reference, members, weights, device)
            found += orders
            bar.update(len(members))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine may need it next
    return found


def device_for(setting: Any) -> torch.device:
    """Where ``model.device`` has matrix products in float32 and float64: the device itself, or of several the first."""
    if isinstance(setting, Mapping):
        found = [device_for(one) for one in setting.values() if one not in ("cpu", "disk")]
        return found[0] if found else torch.device("cpu")
    name = f"cuda:{setting}" if isinstance(setting, int) else str(setting)
    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name if name.startswith("cuda") else "cpu")


def _by_reference(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    members: list[int] = []
    for place, (reference, member) in enumerate(pairs):
        members.append(member)
        if place + 1 == len(pairs) or pairs[place + 1][0] != reference:
            yield reference, members
            members = []


def _aligned_to(
    reference: int, members: Sequence[int], weights: Callable[[int], ExpertWeights], device: torch.device
) -> list[Order]:
    one = weights(reference)
    x = _channels(one, device)
    at_once = max(1, _BYTES // (4 * x.numel() + 12 * len(x) ** 2))
    found: list[Order] = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, _full_float32(), torch.inference_mode():
        for start in range(0, len(members), at_once):
            others = [weights(member) for member in members[start : start + at_once]]
            y = torch.stack([_channels(other, device) for other in others])
            values = _similarity(x, y).cpu().numpy()
            proofs = pool.map(partial(_proven, x), y, values)
            for other, order in zip(others, proofs, strict=True):
                found.append(align_channels(one, other) if order is None else order)
    return found


def _channels(expert: ExpertWeights, device: torch.device) -> Tensor:
    """(I, 3 H): what each channel consists of."""
    parts = (expert.gate, expert.up, expert.down.T)
    return torch.cat([torch.from_numpy(part).to(device) for part in parts], dim=1)


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """(M, I, I) float64: inner products of the rows of ``x`` (I, K) with those of every ``y`` (M, I, K)."""
    total = torch.zeros(len(y), len(x), y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(_BLOCK, dim=1), y.split(_BLOCK, dim=2), strict=True):
        total += a @ b.mT
    return total


def _proven(x: Tensor, y: Tensor, values: np.ndarray) -> Order | None:
    """The best order of the rows of ``y`` (I, K) for those of ``x`` (I, K), if it is certain."""
    if not np.isfinite(values).all():
        return None
    norms = np.outer(_norms(x), _norms(y))
    terms = x.shape[1]
    # Of a sum of n products, in any order, by Cauchy and Schwarz (Higham 2002, section 3.1).
    bounds = _relative_error(min(_BLOCK, terms), _SINGLE) * norms + terms * _TINY
    margin = float((8 * _relative_error(terms, _DOUBLE) + 2.0**-46) * norms.max() + np.finfo(np.float64).tiny)

    def exact(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        places = (torch.from_numpy(indices).to(x.device) for indices in (rows, columns))
        chunk = max(1, _EXACT_BYTES[x.device.type] // (8 * terms))
        parts = [(x[i].double() * y[j].double()).sum(1) for i, j in zip(*(p.split(chunk) for p in places), strict=True)]
        return torch.cat(parts).cpu().numpy()

    order = proven_best(values, bounds, exact, margin)
    return None if order is None else tuple(int(channel) for channel in order)


def _norms(x: Tensor) -> np.ndarray:
    """Upper bounds of the norms of the rows."""
    chunk = max(1, _EXACT_BYTES[x.device.type] // (8 * x.shape[1]))
    return torch.cat([rows.double().norm(dim=1) for rows in x.split(chunk)]).cpu().numpy() * (1.0 + 1e-9)


def _relative_error(terms: int, unit: float) -> float:
    return terms * unit / (1.0 - terms * unit)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products in float32 are what they say, and no faster format."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[tuple[int, int], Order]:
    try:
        _, arrays = read_archive(path)
        pairs, orders = arrays["pairs"].tolist(), arrays["orders"].tolist()
        return {(one, other): tuple(order) for (one, other), order in zip(pairs, orders, strict=True)}
    except FileNotFoundError:
        return {}
    except (Damaged, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s): computing it anew", path, error)
        return {}


def _write(path: Path, known: dict[tuple[int, int], Order]) -> None:
    orders = np.array(list(known.values()))
    smallest = np.min_scalar_type(int(orders.max()))
    write_archive(path, {}, {"pairs": np.array(list(known)), "orders": orders.astype(smallest)})
