"""``winnow -m ... dry_run=true``: the graph of the sweep, and what it takes in all; no weight is read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from harness.cells.cell import asks_for_text, method_version, model_name, recovery_of, resolved
from harness.cells.outcomes import after, anatomy_once, checkpoint_bytes, method_of, quantization_of
from harness.cells.settings import baseline_folder
from harness.errors import WinnowError
from harness.exits import explain
from harness.sweeps.estimates import resources_of
from harness.sweeps.graph import KINDS, Job, Planned, jobs_of
from harness.text import aligned, human

_SHOWN = 40  # jobs of a kind that are listed


def show(cells: Sequence[tuple[str, DictConfig]]) -> None:
    """Print the jobs, their totals, and the cells that are refused. Raises WinnowError where all of them are."""
    found, refused = [], []
    disk = 0
    for label, config in cells:
        try:
            found.append(_sketched(label, config))
            disk += checkpoint_bytes(config)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            refused.append((label, line))
    if not found:
        raise WinnowError(refused[0][1])
    jobs = [replace(job, resources=resources_of(job)) for job in jobs_of(found, bool(cells[0][1].report))]
    print(_text(jobs, disk, refused), flush=True)


def _sketched(label: str, config: DictConfig) -> Planned:
    """As ``harness.sweeps.plan`` has it, but that names come from settings: the model may be out of reach."""
    plain = resolved(config, within="model.")
    model, method = anatomy_once(plain["model"]), method_of(config)
    left = after(model, method, str(config.ratio), config, quantization_of(config))
    if isinstance(left, str):
        raise WinnowError(left)
    bare = method.name == "none" and config.active is None
    skips = plain["skip"]["name"] != "none"
    uncompressed = bare and plain["quantize"]["name"] == "none" and not skips
    reads_text = asks_for_text(method) or skips or any(recovery_of(plain, method))
    measured = uncompressed or plain["baseline"] == "evaluate" or baseline_folder(plain["baseline"]) is not None
    corpus = {k: v for k, v in plain["calibration"].items() if k not in ("statistics", "batch_size", "stream")}
    beside = ("launcher", "resources", "tracking", "calibration", "seed")
    own = {key: value for key, value in plain.items() if key not in beside}
    own |= {"seed": plain["seed"] if method.uses_seed else 0, "version": method_version(method, model.family)}
    return Planned(
        label,
        model_name(config.model),
        plain,
        record=None if uncompressed else _key([own, corpus if reads_text else None]),
        baseline=_key([plain["model"], plain["suite"], plain["backend"]])
        if measured and plain["suite"]["tasks"]
        else None,
        calibration=_key([plain["model"], corpus]) if method.requires else None,
        statistics=method.requires,
        shards=plain["calibration"].get("shards"),
    )


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _text(jobs: Sequence[Job], disk: int, refused: Sequence[tuple[str, str]]) -> str:
    rows: list[Sequence[str]] = [("job", "needs", "GPUs", "memory", "minutes", "what")]
    for kind in KINDS:
        of_kind = [job for job in jobs if job.kind == kind]
        rows += [_row(job) for job in of_kind[:_SHOWN]]
        if len(of_kind) > _SHOWN:
            rows.append((kind, "", "", "", "", f"and {len(of_kind) - _SHOWN} more"))
    totals: list[Sequence[str]] = [("", "jobs", "GPU hours", "hours of a core")]
    for kind in KINDS:
        of_kind = [job for job in jobs if job.kind == kind]
        if of_kind:
            totals.append(_total(kind, of_kind))
    totals.append(_total("in all", jobs))
    told = f"disk: {human(disk)} for the checkpoints of all cells; estimates tell minutes from hours, no more"
    lines = [aligned(rows), aligned(totals), told]
    if refused:
        lines.append(aligned([("refused", "why"), *refused]))
    return "\n\n".join(lines) + "\n"


def _row(job: Job) -> Sequence[str]:
    takes = job.resources
    memory = f"{takes.memory_gib:g} GiB"
    return (job.kind, str(len(job.needs)), str(takes.gpus), memory, f"{takes.minutes:g}", job.label)


def _total(name: str, jobs: Sequence[Job]) -> Sequence[str]:
    gpu_hours = sum(job.resources.gpus * job.resources.minutes for job in jobs) / 60
    hours = sum(job.resources.cpus * job.resources.minutes for job in jobs) / 60
    return (name, f"{len(jobs):,}", f"{gpu_hours:,.1f}", f"{hours:,.1f}")
