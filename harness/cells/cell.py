"""What a cell is: its configuration, resolved and checked as far as that costs nothing, and its id."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.backends.choice import choose
from harness.calibration.collect import wanted_statistics
from harness.calibration.token_cache import tokenized
from harness.calibration.tokens import TokenSequence
from harness.cells.check import check_settings, make
from harness.cells.contents import contents_of
from harness.checkpoints.active import check_active
from harness.checkpoints.check import check_checkpoint, check_names
from harness.checkpoints.config import read_config
from harness.checkpoints.footprint import anatomy_of_folder
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.load import check_device
from harness.checkpoints.packed_weights import SECTION as QUANTIZED
from harness.checkpoints.quantize import Quantization
from harness.checkpoints.skipping import SECTION as SKIPPING
from harness.checkpoints.skipping import Skip
from harness.contracts.layerwise import layerwise
from harness.contracts.method import Method, Schedule
from harness.contracts.recovery import Fit, Recalibration, fit_of
from harness.contracts.search import searching
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ROUTER_SCORES, SAMPLED
from harness.contracts.task import Task
from harness.data.corpora import load_documents
from harness.data.rows import Document
from harness.data.suites import with_data
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of
from harness.records.describe import versions
from harness.records.identity import identified, identity
from harness.reference import MODEL_FOLDER

log = logging.getLogger(__name__)

TOKENIZING = ("max_length", "packing", "chat_template", "max_blocks", "bos")  # settings that documents become tokens by


@dataclass(frozen=True)
class Cell:
    """A cell that is ready to run: nothing of it has been computed, but everything cheap has been checked.

    ``description`` is what its record says of it, ``baseline`` that of the uncompressed model's record. ``contents``
    holds the fingerprints of what it reads, ``sequences`` the tokens of its calibration text. ``method_version`` is
    that of the method on this architecture. ``statistics`` are collected for it; ``shape`` bounds its plan; ``rounds``
    holds the exact ratio of each round.
    """

    config: dict[str, Any]
    description: dict[str, Any]
    baseline: dict[str, Any]
    model: Path
    contents: dict[str, str]
    documents: list[Document]
    sequences: list[TokenSequence]
    method: Method
    method_version: str
    shape: MoeShape
    statistics: frozenset[str]
    schedule: Schedule
    rounds: tuple[Fraction, ...]
    tasks: dict[str, Task]
    lower_top_k: bool = False  # may a layer be left with fewer experts than the model chooses a token?
    quantization: Quantization | None = None
    active: int | None = None  # experts that a token chooses after the plan
    skip: Skip | None = None
    refit: Fit | None = None
    router: Recalibration | None = None

    @property
    def id(self) -> str:
        return self.description["id"]

    @property
    def is_baseline(self) -> bool:
        """The uncompressed model itself."""
        stages = (self.quantization, self.active, self.skip)
        return self.method.name == "none" and all(stage is None for stage in stages)

    @property
    def reads_text(self) -> bool:
        return asks_for_text(self.method) or self.skip is not None or self.recovers

    @property
    def fits(self) -> list[Fit]:
        return _fits(self.method, self.refit)

    @property
    def recovers(self) -> bool:
        return bool(self.fits) or self.router is not None

    @property
    def identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What decides its numbers, and those of its baseline."""
        return identity(
            self.description, self.config, self.contents, self.method_version, self.task_versions, versions()
        )

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
    check_device(config.model.device)
    folder = resolve_checkpoint(config.model.path)
    model_config = read_config(folder)
    family = family_of(model_config)
    if QUANTIZED in model_config:
        raise WinnowError(f"{folder} is quantised already: give the unquantised model, and what it shall become")
    check_checkpoint(folder, family, model_config)
    check_names(folder, model_config)
    method: Method = make(config.method, "method", Method)
    quantization, skip = _stages(config, folder, family, model_config)
    refit, router = _recovery(plain, method)
    shape = family.shape(limits(config, method, family, model_config))
    ratio = method.check(shape, config.ratio)
    schedule: Schedule = make(config.schedule, "schedule", Schedule)
    schedule.check(method, shape, ratio)
    plain["suite"] = with_data(plain["suite"])
    tasks = tasks_of(plain)
    plain["backend"] = _backend(plain, folder, model_config if skip is None else model_config | {SKIPPING: {}}, tasks)
    reads_text = asks_for_text(method) or any(stage is not None for stage in (skip, refit, router))
    if (limit := plain["calibration"]["all_tokens"]) is not None:  # of what is fitted, so of what the cell is
        for node, fit in (("method", fit_of(method)), ("refit", refit)):
            if fit is not None and fit.name == "all_tokens":
                plain[node]["all_tokens"] = limit
        if layerwise(method) is not None:
            plain["method"]["all_tokens"] = limit
    said = {
        "model": model_name(config.model),
        "method": method.name,
        "ratio": float(ratio),
        "calibration": plain["calibration"]["name"] if reads_text else "none",
        "seed": config.seed if method.uses_seed else 0,
        "suite": config.suite.name,
        "backend": plain["backend"]["name"],
    }
    if (left := getattr(method, "leaves", None)) is not None:
        said["leaves"] = left
    if quantization is not None:
        said["quantize"] = quantization.label
    if schedule.rounds > 1:
        said["schedule"] = f"{schedule.name}-{schedule.rounds}"
    if refit is not None:
        said["refit"] = refit.label
    if router is not None:
        said["router"] = router.label
    if config.active is not None:
        said["active"] = f"{config.active}-active"
    if skip is not None:
        said["skip"] = skip.label
    documents, sequences = corpus_of(plain, folder) if reads_text else ([], [])
    contents = contents_of(folder, method, tasks, sequences)
    version = method_version(method, family)
    description, baseline = identified(said, plain, contents, version, task_versions(tasks), versions())
    return Cell(
        config=plain,
        description=description,
        baseline=baseline,
        model=folder,
        contents=contents,
        documents=documents,
        sequences=sequences,
        method=method,
        method_version=version,
        shape=shape,
        statistics=wanted_statistics(plain["calibration"]["statistics"], method.requires, also),
        schedule=schedule,
        rounds=tuple(schedule.ratios(shape, ratio)),
        tasks=tasks,
        lower_top_k=lowers_top_k(config, family, model_config),
        quantization=quantization,
        active=config.active,
        skip=skip,
        refit=refit,
        router=router,
    )


def corpus_of(plain: Mapping[str, Any], folder: Path) -> tuple[list[Document], list[TokenSequence]]:
    """The calibration text, and its tokens by the tokenizer in ``folder``. Raises WinnowError as they do."""
    settings = plain["calibration"]
    documents = load_documents(settings["corpus"])
    return documents, tokenized(documents, folder, {name: settings[name] for name in TOKENIZING})


def resolved(config: DictConfig, within: str = "") -> dict[str, Any]:
    """The configuration as plain data. Raises WinnowError for settings (those that start with ``within``) without a
    value, and for those that cannot be."""
    missing = sorted(key for key in OmegaConf.missing_keys(config) if key.startswith(within))
    if missing:
        raise WinnowError(f"settings without a value: {', '.join(missing)}; give them as {missing[0]}=...")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_settings(plain)
    return plain


def tasks_of(plain: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks of the suite in a resolved configuration, by the suite's names. Raises WinnowError as they do."""
    suite = plain["suite"]["tasks"]
    return {name: make(node, f"suite.tasks.{name}", Task, _convert_="all") for name, node in suite.items()}


def asks_for_text(method: Method) -> bool:
    return bool(method.requires) or searching(method) is not None or layerwise(method) is not None


def method_version(method: Method, family: Family) -> str:
    """Of what ``method`` decides on this architecture.

    Scores of a router with sigmoids were once a softmax of its logits: what is decided by them now is something else,
    and on any other router the same as ever.
    """
    changed = family.sigmoid_router and bool(ROUTER_SCORES & method.requires)
    return f"{method.version} (sigmoid scores)" if changed else method.version


def task_versions(tasks: Mapping[str, Task]) -> dict[str, str]:
    return {name: str(task.version) for name, task in tasks.items()}


def _stages(
    config: DictConfig, folder: Path, family: Family, model_config: Mapping[str, Any]
) -> tuple[Quantization | None, Skip | None]:
    """What is done besides the method. Raises WinnowError where the model cannot have it."""
    quantization: Quantization | None = None
    if config.quantize.name != "none":
        quantization = make(config.quantize, "quantize", Quantization)
    if quantization is not None:
        quantization.check(family, model_config)
    if config.active is not None:
        check_active(config.active, family, model_config)
    skip: Skip | None = None if config.skip.name == "none" else make(config.skip, "skip", Skip)
    if skip is not None:
        skip.check(config.active or family.top_k(model_config))
        if SKIPPING in model_config:
            raise WinnowError(f"{folder} skips experts already: give the model that does not")
    return quantization, skip


def recovery_of(plain: Mapping[str, Any], method: Method) -> tuple[list[Fit], Recalibration | None]:
    """The refits, one after the other, and the recalibration of a resolved configuration."""
    refit, router = _recovery(plain, method)
    return _fits(method, refit), router


def _recovery(config: Mapping[str, Any], method: Method) -> tuple[Fit | None, Recalibration | None]:
    """What repairs the model once the method is through; nothing of the uncompressed model, which needs none."""
    if method.name == "none":
        return None, None
    refit: Fit | None = None if config["refit"]["name"] == "none" else make(config["refit"], "refit", Fit)
    router: Recalibration | None = None
    if config["router"]["name"] != "as_is":
        router = make(config["router"], "router", Recalibration)
    return refit, router


def _fits(method: Method, refit: Fit | None) -> list[Fit]:
    """That of the method itself, then the one asked for."""
    return [fit for fit in (fit_of(method), refit) if fit is not None]


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
    if family.fixed_top_k:
        raise WinnowError(f"lower_top_k=true does not go with a {family.model_type} model, whose router has one top-k")
    if searching(method) is not None:
        raise WinnowError("lower_top_k=true does not go with allocation=evoesap, which runs the routers as they are")
    if SAMPLED & set(method.requires):
        raise WinnowError(f"lower_top_k=true does not go with method={method.name}, which runs the router as it is")
    return family.with_top_k(model_config, 1)
