"""Time and memory of a calibration pass against the plain forward: ``python -m harness.speed.calibration``.

A random Qwen3-MoE of 4 layers, hidden 512, 64 experts of width 192, top-8, on 8 x 512 tokens, float32. Exits
with status 1 where a bar is missed.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness import progress
from harness.calibration.collect import collect
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import NOVICES, RELEASED, SAMPLED, SQUARE, STATISTICS
from harness.families.table import FAMILIES

# What coverage reads as it is, by any of its channel scores; not the moving averages of the released code.
COVERAGE = frozenset({"frequency", "attribution_sum", "channel_square_sum", "channel_saliency_sum", "input_square_sum"})
# What the pruning criteria read: no router logits of all experts against all, no output of unrouted experts.
PRUNING = (frozenset(STATISTICS) - {"output_mean"} - SQUARE - COVERAGE - RELEASED - SAMPLED - NOVICES) | {"frequency"}
MAX_PRUNING_RATIO = 1.25
MAX_COVERAGE_RATIO = 1.6
MAX_EVERYTHING_RATIO = 8.0
MAX_EXTRA_MEGABYTES = 200.0
_SEQUENCES, _LENGTH, _VOCABULARY = 8, 512, 1024


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=_VOCABULARY, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1024, moe_intermediate_size=192, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=_LENGTH,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def peak_megabytes(run: Callable[[], None]) -> float:
    """The most resident memory that the process has while it does ``run``, sampled every millisecond."""
    process = psutil.Process()
    peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of a calibration pass against the plain forward.")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; the medians are compared")
    repeats = parser.parse_args().repeats
    model = random_model()
    ids = np.random.default_rng(0).integers(0, _VOCABULARY, (_SEQUENCES, _LENGTH))
    sequences = [TokenSequence(row, (_LENGTH,), ("random",)) for row in ids]

    def plain() -> None:
        with torch.inference_mode():
            model.base_model(input_ids=torch.from_numpy(ids), use_cache=False)

    def calibration(names: frozenset[str]) -> Callable[[], None]:
        return lambda: void(collect(model, sequences, FAMILIES["qwen3_moe"], names, _SEQUENCES))

    work = {
        "plain": plain,
        "pruning": calibration(PRUNING),
        "coverage": calibration(COVERAGE),
        "everything": calibration(frozenset(STATISTICS) - SAMPLED),
    }
    with progress.showing(False):
        plain()  # touches the weights for the first time
        peaks = {name: peak_megabytes(run) for name, run in work.items()}
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(repeats):
            for name, run in work.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"plain forward: {median['plain']:.2f} s (median of {repeats}, {torch.get_num_threads()} threads)")
    print(f"peak memory of the process, MB: {', '.join(f'{name} {peak:.0f}' for name, peak in peaks.items())}")
    passed = [
        report(
            "pruning statistics, time",
            median["pruning"] / median["plain"],
            MAX_PRUNING_RATIO,
            "x plain forward",
        ),
        report(
            "coverage statistics, time",
            median["coverage"] / median["plain"],
            MAX_COVERAGE_RATIO,
            "x plain forward",
        ),
        report(
            "all statistics, time",
            median["everything"] / median["plain"],
            MAX_EVERYTHING_RATIO,
            "x plain forward",
        ),
        report("peak memory, pruning", peaks["pruning"] - peaks["plain"], MAX_EXTRA_MEGABYTES, "MB above plain"),
        report("peak memory, coverage", peaks["coverage"] - peaks["plain"], MAX_EXTRA_MEGABYTES, "MB above plain"),
        report("peak memory, all", peaks["everything"] - peaks["plain"], MAX_EXTRA_MEGABYTES, "MB above plain"),
    ]
    return 0 if all(passed) else 1


def void(result: object) -> None:
    """Drops a result, so that it is freed at once."""


def report(what: str, value: float, limit: float, unit: str) -> bool:
    passed = value <= limit
    print(f"{'PASS' if passed else 'FAIL'}  {what}: {value:.3g} {unit} (bar: {limit:g})")
    return passed


if __name__ == "__main__":
    sys.exit(main())
