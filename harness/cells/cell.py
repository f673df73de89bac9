"""What a cell is: its configuration, resolved and checked as far as that costs nothing, and its id."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.backends.choice import choose
from harness.calibration.collect import wanted_statistics
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.fingerprint import model_fingerprint
from harness.checkpoints.footprint import anatomy_of_folder
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.packed_weights import SECTION as QUANTIZED
from harness.checkpoints.quantize import Quantization
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.checkpoints.skipping import Skip
from harness.contracts.method import Method, Schedule
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import SAMPLED
from harness.contracts.task import Task
from harness.data.suites import with_data
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of
from harness.records.identity import identified
from harness.reference import MODEL_FOLDER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """A cell that is ready to run: nothing of it has been computed, but everything cheap has been checked.

    ``description`` is what its record says of it, ``baseline`` that of the uncompressed model's record. ``statistics``
    are collected for it; ``shape`` bounds its plan; ``rounds`` holds the exact ratio of each round.
    """

    config: dict[str, Any]
    description: dict[str, Any]
    baseline: dict[str, Any]
    model: Path
    fingerprint: str
    method: Method
    shape: MoeShape
    statistics: frozenset[str]
    schedule: Schedule
    rounds: tuple[Fraction, ...]
    tasks: dict[str, Task]
    lower_top_k: bool = False  # may a layer be left with fewer experts than the model chooses a token?
    quantization: Quantization | None = None
    skip: Skip | None = None

    @property
    def id(self) -> str:
        return self.description["id"]

    @property
    def is_baseline(self) -> bool:
        """The uncompressed model itself."""
        return self.method.name == "none" and self.quantization is None and self.skip is None

    @property
    def reads_text(self) -> bool:
        return bool(self.method.requires) or self.skip is not None

    @property
    def task_versions(self) -> dict[str, str]:
        return task_versions(self.tasks)


def prepare(config: DictConfig, also: frozenset[str] = frozenset()) -> Cell:
    """Resolve the configuration and check what can be checked without loading a weight.

    Settings that the method does not use (a seed where nothing is random, a corpus where no statistic is read) do not
    count: cells that differ only in them are one cell. ``also`` names statistics that other cells of the sweep need.
    Raises WinnowError for what does not fit.
    """
    plain = resolved(config)
    folder = resolve_checkpoint(config.model.path)
    model_config = read_config(folder)
    family = family_of(model_config)
    if QUANTIZED in model_config:
        raise WinnowError(f"{folder} is quantised already: give the unquantised model, and what it shall become")
    check_checkpoint(folder, family, model_config)
    method: Method = instantiate(config.method)
    quantization, skip = _stages(config, folder, family, model_config)
    shape = family.shape(limits(config, method, family, model_config))
    ratio = method.check(shape, config.ratio)
    schedule: Schedule = instantiate(config.schedule)
    schedule.check(method, shape, ratio)
    plain["suite"] = with_data(plain["suite"])
    tasks = tasks_of(plain)
    plain["backend"] = _backend(plain, folder, model_config if skip is None else model_config | {SKIPPING: {}}, tasks)
    reads_text = bool(method.requires) or skip is not None
    said = {
        "model": model_name(config.model),
        "method": method.name,
        "ratio": float(ratio),
        "calibration": plain["calibration"]["name"] if reads_text else "none",
        "seed": config.seed if method.uses_seed else 0,
        "suite": config.suite.name,
        "backend": plain["backend"]["name"],
    }
    if quantization is not None:
        said["quantize"] = quantization.label
    if schedule.rounds > 1:
        said["schedule"] = f"{schedule.name}-{schedule.rounds}"
    if skip is not None:
        said["skip"] = skip.label
    fingerprint = model_fingerprint(folder)
    description, baseline = identified(said, plain, fingerprint, method.version, task_versions(tasks))
    return Cell(
        config=plain,
        description=description,
        baseline=baseline,
        model=folder,
        fingerprint=fingerprint,
        method=method,
        shape=shape,
        statistics=wanted_statistics(plain["calibration"]["statistics"], method.requires, also),
        schedule=schedule,
        rounds=tuple(schedule.ratios(shape, ratio)),
        tasks=tasks,
        lower_top_k=lowers_top_k(config, family, model_config),
        quantization=quantization,
        skip=skip,
    )


def resolved(config: DictConfig, within: str = "") -> dict[str, Any]:
    """The configuration as plain data. Raises WinnowError for settings (those that start with ``within``) without a
    value."""
    missing = sorted(key for key in OmegaConf.missing_keys(config) if key.startswith(within))
    if missing:
        raise WinnowError(f"settings without a value: {', '.join(missing)}; give them as {missing[0]}=...")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return plain


def tasks_of(plain: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks of the suite in a resolved configuration, by the suite's names. Raises WinnowError as they do."""
    return {name: instantiate(node, _convert_="all") for name, node in plain["suite"]["tasks"].items()}


def task_versions(tasks: Mapping[str, Task]) -> dict[str, str]:
    return {name: str(task.version) for name, task in tasks.items()}


def _stages(
    config: DictConfig, folder: Path, family: Family, model_config: Mapping[str, Any]
) -> tuple[Quantization | None, Skip | None]:
    """What is done besides the method. Raises WinnowError where the model cannot have it."""
    quantization: Quantization | None = None if config.quantize.name == "none" else instantiate(config.quantize)
    if quantization is not None:
        quantization.check(family, model_config)
    skip: Skip | None = None if config.skip.name == "none" else instantiate(config.skip)
    if skip is not None:
        skip.check(family.top_k(model_config))
        if SKIPPING in model_config:
            raise WinnowError(f"{folder} skips experts already: give the model that does not")
    return quantization, skip


def _backend(plain: Mapping[str, Any], folder: Path, served: Mapping[str, Any], tasks: Mapping[str, Task]) -> Any:
    """The node of the backend that serves the compressed model, whose config.json is ``served`` but for its sizes."""
    node, why = choose(
        plain["backend"], served, tasks.values(), lambda: anatomy_of_folder(folder, served).active_parameters
    )
    if why:
        log.info("backend %s: %s", node["name"], why)
    return node


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


def limits(config: DictConfig, method: Method, family: Family, model_config: Mapping[str, Any]) -> Mapping[str, Any]:
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
