"""Which sizes of GPU hold the stages of a cell, and how many of them."""

from collections.abc import Sequence

from harness.cells.stages import GPUS, USABLE, Stage

SIZES = (24, 48, 80, 141, 192)  # GB


def gpus_needed(stages: Sequence[Stage]) -> list[Sequence[str]]:
    """Rows for a table: of each stage that computes on devices the fewest GPUs of each size; "-" where a machine's
    ``GPUS`` do not hold it."""
    rows: list[Sequence[str]] = [("GPUs needed", *(f"{size} GB" for size in SIZES))]
    for stage in stages:
        if stage.counts:
            rows.append((stage.name, *(str(stage.fewest(size) or "-") for size in SIZES)))
    return rows


def footnote(stages: Sequence[Stage]) -> str:
    shares = sorted({stage.share for stage in stages if stage.counts and stage.share != USABLE})
    told = "".join(f", of vLLM with gpu_memory_utilization={share:g}" for share in shares)
    return (
        f"{USABLE:.0%} of a GPU counts{told}. Several share a model by its layers (model.device=auto), in vLLM by "
        f"tensor_parallel_size; -: more than {GPUS[-1]}."
    )
