"""Seconds that M-SMoE's alignment takes a pair of experts: ``python -m harness.speed.alignment``.

Random experts of the shape of Qwen3-30B-A3B (hidden size 2048, 768 channels), bfloat16 as it is stored: float64 in full
against float32 products that are proven. Exits with status 1 where an order differs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from harness import progress
from harness.calibration.alignments import aligned, device_for
from harness.contracts.alignment import align_channels
from harness.contracts.statistics import ExpertWeights


def random_expert(hidden: int, width: int, seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*size: int) -> np.ndarray:
        return (torch.randn(*size, generator=generator) * 0.02).bfloat16().float().numpy()

    return ExpertWeights(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))


def main() -> int:
    parser = argparse.ArgumentParser(description="Seconds of M-SMoE's alignment a pair of experts, both ways.")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size")
    parser.add_argument("--width", type=int, default=768, help="channels of an expert")
    parser.add_argument("--pairs", type=int, default=4, help="members that are aligned to one dominant at once")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats; the medians are compared")
    parser.add_argument("--device", default="auto", help="of the proven products")
    given = parser.parse_args()
    device = device_for(given.device)
    experts = [random_expert(given.hidden, given.width, seed) for seed in range(given.pairs + 1)]
    pairs = [(0, member) for member in range(1, len(experts))]
    work: dict[str, Callable[[], Sequence[tuple[int, ...]]]] = {
        "float64": lambda: [align_channels(experts[one], experts[other]) for one, other in pairs],
        "proven": lambda: aligned(experts.__getitem__, pairs, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    found: dict[str, Sequence[tuple[int, ...]]] = {}
    with progress.showing(False):
        aligned(experts.__getitem__, pairs[:1], device)  # wakes the device
        for _ in range(given.repeats):
            for name, run in work.items():
                started = time.perf_counter()
                found[name] = run()
                seconds[name].append((time.perf_counter() - started) / len(pairs))
    before, after = (statistics.median(seconds[name]) for name in work)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"hidden size {given.hidden}, {given.width} channels, {torch.get_num_threads()} threads, products on {where}")
    print(f"float64 in full: {before:.3f} s a pair; proven: {after:.3f} s a pair; ratio {before / after:.2f}")
    same = found["float64"] == found["proven"]
    print("PASS  the orders are the same" if same else "FAIL  an order differs")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
