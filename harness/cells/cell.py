"""What a cell is: its configuration, resolved and checked as far as that costs nothing, and its id."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.backends.choice import choose
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.fingerprint import model_fingerprint
from harness.checkpoints.footprint import anatomy_of_folder
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.packed_weights import SECTION as QUANTIZED
from harness.checkpoints.quantize import Quantization
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.checkpoints.skipping import Skip
from harness.contracts.statistics import SAMPLED
from harness.data.suites import with_data
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of
from harness.records.store import cell_id
from harness.reference import MODEL_FOLDER

log = logging.getLogger(__name__)

# What of the calibration node cannot change a result: how the pass is run and what else it collects.
NOT_IDENTITY = ("statistics", "batch_size", "corpus")
# What of a suite cannot change a result either: where its data lie, and how its judge is reached.
NOT_IDENTITY_OF_SUITE = ("root", "base_url", "api_key_env", "timeout", "retries", "backoff", "concurrency")


@dataclass(frozen=True)
class Cell:
    """A cell that is ready to run: nothing of it has been computed, but everything cheap has been checked."""

    config: dict[str, Any]
    description: dict[str, Any]
    baseline: dict[str, Any]
    model: Path
    fingerprint: str
    method: Any
    top_k: int  # the fewest experts that a layer may be left with
    schedule: Any
    rounds: tuple[Any, ...]  # of each round the ratio, exact
    lower_top_k: bool = False  # may a layer be left with fewer experts than the model chooses a token?
    quantization: Quantization | None = None
    skip: Skip | None = None

    @property
    def id(self) -> str:
        return self.description["id"]


def prepare(config: DictConfig) -> Cell:
    """Resolve the configuration and check what can be checked without loading a weight.

    Settings that the method does not use (a seed where nothing is random, a corpus where no statistic is read) do not
    count: cells that differ only in them are one cell. Raises WinnowError for what does not fit.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise WinnowError(f"settings without a value: {', '.join(missing)}; give them as {missing[0]}=...")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    method = instantiate(config.method)
    folder = resolve_checkpoint(config.model.path)
    model_config = read_config(folder)
    family = family_of(model_config)
    if QUANTIZED in model_config:
        raise WinnowError(f"{folder} is quantised already: give the unquantised model, and what it shall become")
    check_checkpoint(folder, family, model_config)
    quantization = None if config.quantize.name == "none" else instantiate(config.quantize)
    if quantization is not None:
        quantization.check(family, model_config)
    lower_top_k = lowers_top_k(config, family, model_config)
    bounds = limits(config, method, family, model_config)
    experts_and_groups = family.num_experts(bounds), family.router_groups(bounds)
    top_k = family.top_k(bounds)
    ratio = method.check(experts_and_groups[0], top_k, experts_and_groups[1], config.ratio, family.shape(bounds))
    schedule = instantiate(config.schedule)
    schedule.check(method, *experts_and_groups, ratio)
    skip = None if config.skip.name == "none" else instantiate(config.skip)
    if skip is not None:
        skip.check(family.top_k(model_config))
        if SKIPPING in model_config:
            raise WinnowError(f"{folder} skips experts already: give the model that does not")
        model_config |= {SKIPPING: {}}  # so it will be, which not every backend can
    fingerprint = model_fingerprint(folder)
    plain["suite"] = with_data(plain["suite"])
    tasks = [instantiate(node, _convert_="all") for node in plain["suite"]["tasks"].values()]
    plain["backend"], why = choose(
        plain["backend"], model_config, tasks, lambda: anatomy_of_folder(folder, model_config).active_parameters
    )
    if why:
        log.info("backend %s: %s", plain["backend"]["name"], why)
    calibration = plain["calibration"] if method.requires or skip else {"name": "none"}
    description = {
        "model": model_name(config.model),
        "method": method.name,
        "ratio": float(ratio),
        "calibration": calibration["name"],
        "seed": config.seed if method.uses_seed else 0,
        "suite": config.suite.name,
        "backend": plain["backend"]["name"],
    }
    identity = {
        "model": {"fingerprint": fingerprint, "dtype": config.model.dtype},
        "method": plain["method"],
        "calibration": {key: value for key, value in calibration.items() if key not in NOT_IDENTITY},
        "suite": _without(plain["suite"], NOT_IDENTITY_OF_SUITE),
        "layout": config.layout,
    }
    if lower_top_k:  # cells from before there was such a setting keep their ids
        identity["lower_top_k"] = True
    if plain["backend"]["open"].get("engine"):
        identity["engine"] = plain["backend"]["open"]["engine"]
    baseline = description | {"method": "none", "ratio": 0.0, "calibration": "none", "seed": 0}
    baseline["id"] = cell_id(
        baseline | {"id": ""}, {key: identity[key] for key in ("model", "suite", "engine") if key in identity}
    )
    if quantization is not None:  # likewise
        description["quantize"] = quantization.label
        identity["quantize"] = plain["quantize"]
    if schedule.rounds > 1:  # likewise
        description["schedule"] = f"{schedule.name}-{schedule.rounds}"
        identity["schedule"] = plain["schedule"]
    if skip is not None:
        description["skip"] = skip.label
        identity["skip"] = plain["skip"]
    description |= {"id": cell_id(description, identity), "baseline": baseline["id"]}
    rounds = tuple(schedule.ratios(*experts_and_groups, ratio))
    return Cell(
        plain, description, baseline, folder, fingerprint, method, top_k, schedule, rounds, lower_top_k, quantization,
        skip,
    )  # fmt: skip


def model_name(node: DictConfig) -> str:
    """What records call the model: its configuration's name, or its folder's where another path was given to that of
    the reference MoE or the configuration has none."""
    folder = Path(node.path).resolve()
    other = node.name == "reference" and folder != MODEL_FOLDER.resolve()
    return folder.name if other or node.name is None else str(node.name)


def lowers_top_k(config: DictConfig, family: Family, model_config: Mapping[str, Any]) -> bool:
    """Whether a ratio may leave fewer experts than the model chooses a token: where asked for, and where it chooses all
    of them for every token, as it goes on to do."""
    return bool(config.lower_top_k) or family.top_k(model_config) == family.num_experts(model_config)


def limits(config: DictConfig, method: Any, family: Family, model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json that bounds a ratio: the model's, or where top-k is lowered that of one that chooses one expert.

    Raises WinnowError where top-k cannot be lowered.
    """
    if not lowers_top_k(config, family, model_config):
        return model_config
    if family.router_groups(model_config) > 1:
        raise WinnowError("lower_top_k=true does not go with a group-limited router")
    if SAMPLED & set(method.requires):
        raise WinnowError(f"lower_top_k=true does not go with method={method.name}, which runs the router as it is")
    return family.with_top_k(model_config, 1)


def _without(node: Any, keys: Sequence[str]) -> Any:
    """A node of the configuration without these keys, at any depth."""
    if not isinstance(node, dict):
        return node
    return {key: _without(value, keys) for key, value in node.items() if key not in keys}
