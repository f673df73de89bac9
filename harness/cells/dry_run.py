"""``dry_run=true``: what a cell would need and leave, from config.json and headers; no weight is read.

The sizes are exact (``harness.checkpoints.footprint``), but for methods that give every expert a width of its own:
theirs have a ~, because it hangs on the statistics how many router rows stay. The memory of a stage is what its arrays
take at most:

- calibration: weights in ``model.dtype`` + activations of one batch (``activation_bytes``) + statistics
  (``statistics_bytes``, float64, on the devices of the model);
- decide: statistics + one expert in float32, in the host's memory;
- apply: the largest shard + one expert in float32 on its way into a sum, in the host's memory;
- evaluation: weights as they are after the cell + keys and values (``cache_bytes_per_token``) of a batch of the longest
  sequences that the backend takes.

Not in it: the interpreter and its libraries (about 1 GB), what a GPU's allocator holds back, and logits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from omegaconf import DictConfig

from harness.backends.choice import choose
from harness.calibration.collect import wanted_statistics
from harness.cells.cell import limits, resolved, tasks_of
from harness.cells.check import make
from harness.checkpoints.config import read_config
from harness.checkpoints.footprint import (
    Anatomy,
    activation_bytes,
    anatomy_of_config,
    anatomy_of_folder,
    cache_bytes_per_token,
    compressed,
    dtype_named,
    expert_bytes_float32,
    outcome,
    quantised_bytes,
    statistics_bytes,
)
from harness.checkpoints.hub import HubOutOfReach, fetch_config, local_folder
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.quantize import Quantization
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.checkpoints.skipping import Skip
from harness.contracts.method import Method, Schedule
from harness.errors import WinnowError
from harness.text import aligned

LADDER = ("0.125", "0.25", "0.375", "0.5")


def show(config: DictConfig, of_sweep: frozenset[str] | None = None) -> None:
    """Print the report of the cell; of a single one also what other ratios would leave.

    ``of_sweep`` names the statistics that the cell's sweep needs; None outside of one.
    Raises WinnowError where the real run would before it loads a weight; for a ratio of a single cell that does not
    fit, after the report.
    """
    text, refusal = report(config, of_sweep)
    print(text, flush=True)
    if refusal and of_sweep is None:
        raise WinnowError(refusal)


def report(config: DictConfig, of_sweep: frozenset[str] | None = None) -> tuple[str, str]:
    """The report, and why the ratio that was asked for is refused (empty where it is not)."""
    plain = resolved(config, within="model.")
    model, source = anatomy(plain["model"])
    method: Method = make(config.method, "method", Method)
    quantization = None if plain["quantize"]["name"] == "none" else make(config.quantize, "quantize", Quantization)
    asked = str(config.ratio)
    ratios = [asked] if of_sweep is not None or method.name == "none" else sorted({*LADDER, asked}, key=_number)
    sizes = {ratio: _after(model, method, ratio, config, quantization) for ratio in ratios}
    left = sizes[asked]
    refusal = left if isinstance(left, str) else ""
    title = f"{plain['model']['name']}: {plain['model']['path']}\n{source}; no weight was read"
    with_quantization = "" if quantization is None else f" quantize={quantization.label}"
    blocks = [
        title,
        aligned(_architecture(model)),
        f"method={method.name}{with_quantization}\n{aligned(_sizes(model, sizes))}",
        aligned(_memory(plain, model, method, left, of_sweep or frozenset())),
    ]
    return "\n\n".join(blocks) + "\n", refusal


def anatomy(node: Mapping[str, Any]) -> tuple[Anatomy, str]:
    """The checkpoint that the ``model`` node names, and where that is known from.

    A local folder's config.json and headers; else the hub's config.json; and where the hub is out of reach, what the
    node itself says in ``architecture``. Raises WinnowError where there is none of these.
    """
    folder = local_folder(node["path"])
    if folder is not None:
        return anatomy_of_folder(folder, read_config(folder)), "from config.json and the headers of its files"
    known = node.get("architecture")
    try:
        found, source = fetch_config(node["path"]), "from config.json on the hub"
    except HubOutOfReach:
        if not known:
            raise
        found, source = known, "from conf/model, because the hub is out of reach"
    try:
        return anatomy_of_config(found), source
    except WinnowError as error:
        raise WinnowError(f"model '{node['path']}': {error}") from error


# What a ratio leaves: the model afterwards and its bytes, or why it is refused.
After = tuple[Anatomy, int] | str


def _after(model: Anatomy, method: Method, ratio: str, config: DictConfig, quantization: Quantization | None) -> After:
    try:
        bounds = limits(config, method, model.family, model.config)
        shape = model.family.shape(bounds)
        exact = method.check(shape, ratio)
        make(config.schedule, "schedule", Schedule).check(method, shape, exact)
        if config.skip.name != "none":
            make(config.skip, "skip", Skip).check(model.top_k)
        after = compressed(model, outcome(method, exact, replace(model, config=bounds), config.seed), config.layout)
        return after, after.headers.total_bytes if quantization is None else quantised_bytes(after, quantization)
    except WinnowError as error:
        return str(error)


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
    for ratio, after in sizes.items():
        if isinstance(after, str):
            rows.append((ratio, f"refused: {after}"))
            continue
        smaller, weight_bytes = after
        layout, *_ = layer_layouts(smaller.config, smaller.family).values()
        widths = sorted(set(layout.widths))
        channels = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        counts = (str(layout.experts), str(layout.rows), channels, _count(smaller.headers.parameters))
        share = f"{weight_bytes / before:.1%}"
        about = "~" if len(widths) > 1 else ""
        rows.append((ratio, *counts, f"{about}{weight_bytes:,}", human(weight_bytes), share))
    return rows


def _memory(
    plain: Mapping[str, Any], model: Anatomy, method: Method, asked: After, of_sweep: frozenset[str]
) -> list[Sequence[str]]:
    settings, dtype = plain["calibration"], plain["model"]["dtype"]
    loaded = _loaded_bytes(model, dtype)
    itemsize = max(1, round(loaded / model.headers.parameters))
    rows: list[Sequence[str]] = [("stage", "memory", "of which")]
    names = wanted_statistics(settings["statistics"], method.requires, of_sweep)
    statistics = statistics_bytes(model, names) if method.requires else 0
    if method.requires or plain["skip"]["name"] != "none":
        batch, length = settings["batch_size"], settings["max_length"]
        activations = activation_bytes(model, batch * length, itemsize)
        parts = f"weights {human(loaded)}, activations at most {human(activations)} ({batch} x {length} tokens), "
        parts += f"statistics {human(statistics)}"
        rows.append(("calibration", human(loaded + activations + statistics), parts))
    else:
        rows.append(("calibration", "none", f"method {method.name} reads no statistics"))
    expert = expert_bytes_float32(model)
    parts = f"statistics {human(statistics)}, one expert in float32 {human(expert)}"
    rows.append(("decide", human(statistics + expert), parts))
    parts = f"the largest shard {human(model.largest_shard)}, one expert in float32 {human(expert)}"
    rows.append(("apply", human(model.largest_shard + expert), parts))
    rows.append(_evaluation(plain, model if isinstance(asked, str) else asked[0], dtype, itemsize))
    return rows


def _evaluation(plain: Mapping[str, Any], after: Anatomy, dtype: str, itemsize: int) -> Sequence[str]:
    if not plain["suite"]["tasks"]:
        return ("evaluation", "none", f"suite {plain['suite']['name']} has no tasks")
    tasks = tasks_of(plain).values()
    config = dict(after.config) if plain["skip"]["name"] == "none" else {**after.config, SKIPPING: {}}
    backend, _ = choose(plain["backend"], config, tasks, lambda: after.active_parameters)
    loaded, a_token = _loaded_bytes(after, dtype), cache_bytes_per_token(after, itemsize)
    options = backend["open"]
    length = options.get("max_length") or after.config.get("max_position_embeddings") or 2048
    if "batch_size" in options:
        cache = a_token * options["batch_size"] * length
        parts = f"KV cache at most {human(cache)} ({options['batch_size']} x {length} tokens of {human(a_token)})"
    elif options.get("kv_cache_gib"):
        cache = int(options["kv_cache_gib"] * 2**30)
        parts = f"KV cache {human(cache)}, for {cache // max(a_token, 1):,} tokens"
    else:  # vLLM takes for its cache what its share of the device leaves
        cache = a_token * length
        parts = f"KV cache at least {human(cache)} (one sequence of {length} tokens of {human(a_token)})"
    return ("evaluation", human(loaded + cache), f"weights {human(loaded)}, {parts}, backend {backend['name']}")


def _loaded_bytes(model: Anatomy, dtype: str) -> int:
    if dtype == "auto":
        return model.headers.total_bytes
    return model.headers.parameters * dtype_named(dtype).itemsize


def _number(ratio: str) -> Fraction:
    try:
        return Fraction(ratio)
    except (ValueError, ZeroDivisionError):
        return Fraction(2)  # no number: it comes last, and is refused


def human(nbytes: float) -> str:
    """Bytes as people write them, in powers of 1000."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    power = min(4, int(math.log10(nbytes)) // 3)
    return f"{nbytes / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return f"{parameters:,}"
