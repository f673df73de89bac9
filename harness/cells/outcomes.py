"""What a cell leaves of a model, from shapes alone: no weight is read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.cells.cell import limits
from harness.cells.check import make
from harness.checkpoints.active import check_active
from harness.checkpoints.config import read_config
from harness.checkpoints.footprint import (
    Anatomy,
    anatomy_of_config,
    anatomy_of_folder,
    compressed,
    outcome,
    quantised_bytes,
)
from harness.checkpoints.hub import HubOutOfReach, fetch_config, local_folder
from harness.checkpoints.quantize import Quantization
from harness.checkpoints.skipping import Skip
from harness.contracts.method import Method, Schedule
from harness.errors import WinnowError

# What a ratio leaves: the model afterwards and its bytes, or why it is refused.
After = tuple[Anatomy, int] | str


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


def after(model: Anatomy, method: Method, ratio: str, config: DictConfig, quantization: Quantization | None) -> After:
    """What ``method`` and the stages of ``config`` leave of ``model`` at ``ratio``."""
    try:
        bounds = limits(config, method, model.family, model.config)
        shape = model.family.shape(bounds)
        exact = method.check(shape, ratio)
        make(config.schedule, "schedule", Schedule).check(method, shape, exact)
        if config.active is not None:
            check_active(config.active, model.family, model.config)
        if config.skip.name != "none":
            make(config.skip, "skip", Skip).check(config.active or model.top_k)
        left = compressed(model, outcome(method, exact, replace(model, config=bounds), config.seed), config.layout)
        return left, left.headers.total_bytes if quantization is None else quantised_bytes(left, quantization)
    except WinnowError as error:
        return str(error)


def checkpoint_bytes(config: DictConfig) -> int:
    """The weights of the checkpoint that a cell writes; 0 for one that writes none, being the uncompressed model or
    refused.

    A model's headers are read once a process. Raises WinnowError for a model that cannot be found.
    """
    method, quantization = method_of(config), quantization_of(config)
    if method.name == "none" and quantization is None and config.active is None and config.skip.name == "none":
        return 0
    node: Any = OmegaConf.to_container(config.model, resolve=True)
    left = after(anatomy_once(node), method, str(config.ratio), config, quantization)
    return 0 if isinstance(left, str) else left[1]


def anatomy_once(node: Mapping[str, Any]) -> Anatomy:
    """``anatomy`` of a model, read once a process."""
    return _anatomy_of_text(json.dumps(node, sort_keys=True))


@lru_cache(maxsize=8)
def _anatomy_of_text(node: str) -> Anatomy:
    return anatomy(json.loads(node))[0]


def method_of(config: DictConfig) -> Method:
    made: Method = make(config.method, "method", Method)
    return made


def quantization_of(config: DictConfig) -> Quantization | None:
    return None if config.quantize.name == "none" else make(config.quantize, "quantize", Quantization)
