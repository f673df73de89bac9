"""What jobs take, roughly, from shapes and counts alone: what an engine is asked for, and what a dry run adds up.

Memory and GPUs are the dry run's (``harness.cells.stages``). Minutes are a start and floating-point operations over a
rate: two operations for every active parameter and token. They tell minutes from hours, no more. ``resources.*`` takes
the place of each.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from harness.cells.cell import tasks_of
from harness.cells.dry_run import stages_of
from harness.cells.outcomes import After, after, anatomy_once, method_of, quantization_of
from harness.cells.stages import GPUS, Stage
from harness.checkpoints.footprint import Anatomy
from harness.errors import WinnowError
from harness.sweeps.graph import Job, Resources

_START = 3.0  # minutes for libraries, an engine and reading the weights
_INTERPRETER = 2.0  # GiB of libraries
# Operations a second that one device reaches: while it reads text, and while it writes token by token.
_READING = {True: 1e14, False: 3e10}  # on a GPU, on a CPU
_WRITING = {True: 5e12, False: 1e10}
# Where a count is not known without the data: items of a task, and tokens of an item.
_ITEMS, _LENGTH = 500, 512
_GIB = 2**30


def resources_of(job: Job) -> Resources:
    """Raises WinnowError for a model that cannot be found."""
    if job.kind not in ("baseline", "calibrate", "cell"):
        return Resources(minutes=_START)
    # Jobs that differ in these alone take the same.
    same = ("seed", "output_dir") if job.kind == "calibrate" else ("seed", "output_dir", "calibration")
    told = {name: value for name, value in job.config.items() if name not in same}
    text = json.dumps([job.kind, sorted(job.statistics), told], sort_keys=True, default=str)
    if text not in _known:
        _known[text] = _computed(job)
    return _known[text]


_known: dict[str, Resources] = {}


def _computed(job: Job) -> Resources:
    config, plain = OmegaConf.create(dict(job.config)), job.config
    model, method = anatomy_once(plain["model"]), method_of(config)
    left: After = (model, model.headers.total_bytes)
    if job.kind == "cell":
        left = after(model, method, str(plain["ratio"]), config, quantization_of(config))
    stages = {
        stage.name: stage
        for stage in stages_of(plain, model, method, left, frozenset(job.statistics), job.kind == "baseline")
    }
    on_gpu, asked = str(plain["model"]["device"]) != "cpu", plain["resources"]
    estimate = {
        "gpus": _gpus(job, stages, asked["gpu_gb"]) if on_gpu else 0,
        "cpus": 1,
        "memory_gib": _memory_gib(job, stages, on_gpu),
        "minutes": _minutes(job, model, on_gpu),
    }
    return Resources(**estimate | {name: asked[name] for name in estimate if asked[name] is not None})


def _gpus(job: Job, stages: Mapping[str, Stage], gigabytes: float) -> int:
    """The fewest of that size that hold every stage; a calibration that none holds goes by layer, on one."""
    if job.kind == "calibrate":
        whole = stages["calibration"].fewest(gigabytes) if "calibration" in stages else None
        return whole if whole is not None and "calibration by layer" not in stages else 1
    return stages["evaluation"].fewest(gigabytes) or GPUS[-1] if stages["evaluation"].counts else 1


def _memory_gib(job: Job, stages: Mapping[str, Stage], on_gpu: bool) -> float:
    """Of the host, which on a GPU holds what is decided and rewritten alone."""
    names = {"calibrate": ("calibration", "calibration by layer"), "baseline": ("evaluation",)}.get(
        job.kind, ("decide", "apply", "evaluation")
    )
    own = [stages[name] for name in names if name in stages and not (on_gpu and stages[name].counts)]
    return math.ceil(_INTERPRETER + 1.25 * max((stage.bytes for stage in own), default=0) / _GIB)


def _minutes(job: Job, model: Anatomy, on_gpu: bool) -> float:
    settings = job.config["calibration"]
    read = _sequences(settings) * settings["max_length"] if job.kind == "calibrate" else 0.0
    written = 0.0
    if job.kind != "calibrate":
        try:
            tasks = tasks_of(job.config)
            written = float(sum(task.tokens_to_write() for task in tasks.values()))
            read = len(tasks) * _ITEMS * _LENGTH
        except WinnowError:  # items that cannot be had here
            written = read = len(job.config["suite"]["tasks"]) * _ITEMS * _LENGTH
    # A pass that collects statistics takes up to four times a plain one.
    seconds = 2 * model.active_parameters * (4 * read / _READING[on_gpu] + written / _WRITING[on_gpu])
    return math.ceil(_START + seconds / 60)


def _sequences(settings: Mapping[str, Any]) -> float:
    parts = settings.get("parts")
    count = settings.get("max_blocks") if settings.get("packing") else settings.get("num_sequences")
    if count is None and isinstance(parts, Mapping):
        count = sum(parts.values())
    return float(count or _ITEMS)
