"""``dry_run=true``: what a cell would need and leave, from config.json and headers; no weight is read.

The sizes are exact (``harness.checkpoints.footprint``), but for methods that give every expert a width of its own:
theirs have a ~, because it hangs on the statistics how many router rows stay. The memory of a stage is what its arrays
take at most:

- calibration: weights in ``model.dtype`` + activations of one batch (``activation_bytes``) + statistics
  (``statistics_bytes``, on the devices of the model); by layer: one layer and the embedding for the weights;
- decide: statistics + one expert in float32, in the host's memory;
- refit and router: one layer and the embedding (of two models), the text's hidden states, a layer's inputs and outputs;
- apply: the largest shard + one expert in float32 on its way into a sum, in the host's memory;
- evaluation, of the uncompressed model too: weights as they are then + keys and values (``cache_bytes_per_token``), of
  a batch of the longest sequences that the backend takes, on vLLM of one, + there activations of one step.

Not in it: the interpreter and its libraries (about 1 GB), what a GPU's allocator holds back, and logits. How many GPUs
hold a stage: ``harness.cells.gpu_sizes``.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness import progress
from harness.backends.choice import choose
from harness.calibration.collect import wanted_statistics
from harness.cells import stages
from harness.cells.cell import recovery_of, resolved, tasks_of
from harness.cells.gpu_sizes import footnote, gpus_needed
from harness.cells.needs import length_to_plan
from harness.cells.outcomes import After, after, anatomy, method_of, quantization_of
from harness.cells.stages import Stage
from harness.checkpoints.config import model_length
from harness.checkpoints.footprint import Anatomy, statistics_bytes
from harness.checkpoints.hub import local_folder
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.contracts.layerwise import layerwise
from harness.contracts.method import Method
from harness.contracts.search import searching
from harness.contracts.task import Task
from harness.errors import WinnowError
from harness.text import aligned, human

LADDER = ("0.125", "0.25", "0.375", "0.5")
MANY = 10**12  # tokens to write, where it cannot be counted: worth the start of any engine


def show(config: DictConfig) -> None:
    """Print the report of the cell, and what other ratios would leave.

    Raises WinnowError where the real run would before it loads a weight; for a ratio that does not fit, after the
    report.
    """
    text, refusal = report(config)
    print(text, flush=True)
    if refusal:
        raise WinnowError(refusal)


def report(config: DictConfig) -> tuple[str, str]:
    """The report, and why the ratio that was asked for is refused (empty where it is not)."""
    plain = resolved(config, within="model.")
    model, source = anatomy(plain["model"])
    method, quantization = method_of(config), quantization_of(config)
    asked = str(config.ratio)
    ratios = [asked] if method.name == "none" else sorted({*LADDER, asked}, key=_number)
    sizes = {ratio: after(model, method, ratio, config, quantization) for ratio in ratios}
    left = sizes[asked]
    refusal = left if isinstance(left, str) else ""
    title = f"{plain['model']['name']}: {plain['model']['path']}\n{source}; no weight was read"
    with_quantization = "" if quantization is None else f" quantize={quantization.label}"
    skips = plain["skip"]["name"] != "none"
    uncompressed = method.name == "none" and quantization is None and config.active is None and not skips
    found = stages_of(plain, model, method, left, frozenset(), uncompressed)
    blocks = [
        title,
        aligned(_architecture(model)),
        f"method={method.name}{with_quantization}\n{aligned(_sizes(model, sizes))}",
        aligned([("stage", "memory", "of which"), *map(_row, found)]),
        *_devices(plain, model, found),
        _disk(plain, 0 if uncompressed or isinstance(left, str) else left[1]),
    ]
    return "\n\n".join(blocks) + "\n", refusal


def _architecture(model: Anatomy) -> list[Sequence[str]]:
    config, family, headers = model.config, model.family, model.headers
    moe_layers = len(family.moe_layers(config))
    shared = sum(math.prod(headers.shape(name)) for name in headers.names() if model.family.is_shared(name))
    parameters = f"{_count(headers.parameters)}: {_count(model.expert_parameters)} in routed experts, "
    parameters += f"{_count(shared)} in shared experts, {_count(model.active_parameters)} active for a token"
    return [
        ("family", f"{family.model_type}; router: {family.router_kind}"),
        ("MoE layers", f"{moe_layers} of {config['num_hidden_layers']}"),
        ("experts", f"{model.num_experts} in a layer, top-{model.top_k}, {model.width} channels"),
        ("parameters", parameters),
        ("weights", f"{headers.total_bytes:,} bytes ({human(headers.total_bytes)})"),
    ]


def _sizes(model: Anatomy, sizes: Mapping[str, After]) -> list[Sequence[str]]:
    before = model.headers.total_bytes
    rows: list[Sequence[str]] = [("ratio", "experts", "rows", "channels", "parameters", "bytes", "size", "of before")]
    for ratio, left in sizes.items():
        if isinstance(left, str):
            rows.append((ratio, f"refused: {left}"))
            continue
        smaller, weight_bytes = left
        layout, *_ = layer_layouts(smaller.config, smaller.family).values()
        widths = sorted(set(layout.widths))
        channels = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        counts = (str(layout.experts), str(layout.rows), channels, _count(smaller.headers.parameters))
        share = f"{weight_bytes / before:.1%}"
        about = "~" if len(widths) > 1 else ""
        rows.append((ratio, *counts, f"{about}{weight_bytes:,}", human(weight_bytes), share))
    return rows


def stages_of(
    plain: Mapping[str, Any], model: Anatomy, method: Method, asked: After, of_sweep: frozenset[str], uncompressed: bool
) -> list[Stage]:
    """The stages of the cell in their order. ``of_sweep`` names the statistics that its sweep needs besides."""
    settings, dtype = plain["calibration"], plain["model"]["dtype"]
    names = wanted_statistics(settings["statistics"], method.requires, of_sweep)
    statistics = statistics_bytes(model, names) if method.requires else 0
    if (by_layer := layerwise(method)) is not None:
        found = [stages.layer_by_layer(settings, model, dtype, by_layer)]
    elif method.requires or plain["skip"]["name"] != "none":
        found = stages.calibration(settings, model, dtype, statistics)
    else:
        found = [Stage("calibration", f"method {method.name} reads no statistics")]
    if (asking := searching(method)) is not None:
        found.append(stages.search(settings, model, dtype, asking.search))
    found.append(stages.decide(model, statistics))
    fits, router = recovery_of(plain, method)
    if fits:
        found.append(stages.refit(settings, model, dtype, fits))
    if router is not None:
        found.append(stages.router(settings, model, dtype, router))
    found.append(stages.apply(model))
    return found + _evaluations(plain, model, model if isinstance(asked, str) else asked[0], uncompressed)


def _evaluations(plain: Mapping[str, Any], model: Anatomy, left: Anatomy, uncompressed: bool) -> list[Stage]:
    """Of the uncompressed model, where it is opened, and of what is left."""
    if not plain["suite"]["tasks"]:
        return [Stage("evaluation", f"suite {plain['suite']['name']} has no tasks")]
    tasks, dtype = tasks_of(plain), plain["model"]["dtype"]
    config = dict(left.config) if plain["skip"]["name"] == "none" else {**left.config, SKIPPING: {}}
    backend, _ = choose(plain["backend"], config, _countable(tasks.values()), lambda: left.active_parameters)
    given = backend["open"].get("max_length")
    length, known = (given, "as was asked for") if given else _length(plain, tasks, model)
    first = "baseline's evaluation"
    if uncompressed:
        return [stages.evaluation("evaluation", backend, model, dtype, length, known)]
    if plain["baseline"] == "evaluate":
        found = [stages.evaluation(first, backend, model, dtype, length, known)]
    else:
        found = [Stage(first, f"baseline={plain['baseline']} does not open the uncompressed model")]
    return [*found, stages.evaluation("evaluation", backend, left, dtype, length, known)]


_lengths: dict[str, tuple[int, str]] = {}


def _length(plain: Mapping[str, Any], tasks: Mapping[str, Task], model: Anatomy) -> tuple[int, str]:
    """Of a suite and a model it is counted once a process."""
    folder = local_folder(plain["model"]["path"])
    text = json.dumps([plain["suite"], plain["model"], str(folder)], sort_keys=True, default=str)
    if text not in _lengths:
        with progress.showing(False):
            _lengths[text] = length_to_plan(tasks, folder, model_length(model.config))
    return _lengths[text]


class _Unknown:
    """Stands for tasks whose items cannot be had here, so that it is unknown how much they write."""

    def tokens_to_write(self) -> int:
        return MANY


def _countable(tasks: Iterable[Task]) -> list[Any]:
    found = list(tasks)
    try:
        sum(task.tokens_to_write() for task in found)
    except WinnowError:
        return [_Unknown()]
    return found


def _row(stage: Stage) -> Sequence[str]:
    return (stage.name, human(stage.bytes) if stage.bytes else "none", stage.parts)


def _devices(plain: Mapping[str, Any], model: Anatomy, found: Sequence[Stage]) -> list[str]:
    """How many GPUs hold the stages, and where calibration goes by layer; nothing where no stage takes a device."""
    if not any(stage.counts for stage in found):
        return []
    lines = [aligned(gpus_needed(found)), footnote(found)]
    if any(stage.counts and stage.name.startswith("calibration") for stage in found):
        lines.append(stages.where_it_streams(plain["calibration"], model, plain["model"]["dtype"]))
    return ["\n".join(lines)]


def _disk(plain: Mapping[str, Any], checkpoint: int) -> str:
    """What the checkpoint needs of the disk, what is free, and whether it stays."""
    folder = Path(plain["output_dir"]).expanduser().resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = human(shutil.disk_usage(there).free)
    kept = str(plain["keep_checkpoint"]).lower()
    return f"disk: {human(checkpoint)} for this cell's checkpoint; {free} are free; keep_checkpoint={kept}"


def _number(ratio: str) -> Fraction:
    try:
        return Fraction(ratio)
    except (ValueError, ZeroDivisionError):
        return Fraction(2)  # no number: it comes last, and is refused


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return f"{parameters:,}"
