"""Jobs on a Ray cluster: a task each, with object references between those that need one another.

Ray repeats a task whose worker or node was lost, never one that has failed by itself: an error of a job is what its
task returns.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.claims import JOB
from harness.errors import WinnowError, first_line
from harness.sweeps.drive import Told, needed_of
from harness.sweeps.graph import Job
from harness.sweeps.jobs import run_job
from harness.sweeps.state import PACKAGE, Outcome, note

_GIB = 2**30
# What decides where files lie and how libraries behave on the workers, as it does here.
_PASSED_ON = (
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "OMP_",
    "WANDB_",
    "VLLM_",
    "XDG_CACHE_HOME",
    "WINNOW_",
    "PYTHONPATH",
)


@dataclass(frozen=True)
class Ray:
    """``address``: "auto" (the cluster that runs here), "local" (a new one on this machine), HOST:PORT or ray://...

    ``retries``: how often a task is repeated whose worker or node was lost. Where the cluster has a custom resource
    ``model:NAME`` on some nodes, cells of that model go there.
    """

    name: str = "ray"
    address: str = "auto"
    retries: int = 3

    def run(self, jobs: Sequence[Job], graph: Mapping[str, Job], root: Path, sweep: Path, told: Told) -> bool:
        ray = _ray()
        started = not ray.is_initialized()
        if started:
            self._connect(ray)
        try:
            _check_nodes(ray, root, sweep)
            _check_room(ray, jobs)
            self._run(ray, jobs, graph, root.resolve(), sweep.resolve(), told)
        finally:
            if started:
                ray.shutdown()
        return True

    def _connect(self, ray: Any) -> None:
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False}
        options |= {"configure_logging": False}
        if self.address == "local":
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            ray.init(address=self.address, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise WinnowError(
                f"launcher.address={self.address}: there is no Ray cluster ({first_line(error)}); start one with "
                "`ray start --head`, or take launcher.address=local"
            ) from error

    def _run(
        self, ray: Any, jobs: Sequence[Job], graph: Mapping[str, Job], root: Path, sweep: Path, told: Told
    ) -> None:
        known = ray.cluster_resources()
        refs: dict[str, Any] = {}
        of_ref: dict[Any, Job] = {}
        for job in jobs:
            takes = job.resources
            special = f"model:{job.config['model']['name']}" if job.config else ""
            task = ray.remote(_in_task).options(
                num_cpus=takes.cpus,
                num_gpus=takes.gpus,
                memory=int(takes.memory_gib * _GIB),
                resources={special: 0.001} if special in known else None,
                max_retries=self.retries,
                retry_exceptions=False,
                name=job.label,
            )
            behind = [refs[key] for key in job.needs if key in refs]
            ref = task.remote(job, needed_of(job, graph), str(root), str(sweep), *behind)
            refs[job.key], of_ref[ref] = ref, job
            note(sweep, job.key, Outcome("queued"))
        left = list(of_ref)
        while left:
            done, left = ray.wait(left, num_returns=1)
            for ref in done:
                told(of_ref[ref], _outcome(ray, ref, of_ref[ref], sweep))


def _in_task(job: Job, needed: Mapping[str, Job], root: str, sweep: str, *behind: Any) -> Outcome:
    """What a worker runs; ``behind`` is what the jobs that it needs have returned."""
    import ray

    os.environ[JOB] = f"ray {ray.get_runtime_context().get_task_id()}"  # the same when the task is repeated
    os.environ["TQDM_DISABLE"] = "1"
    return run_job(job, needed, root, sweep)


def _outcome(ray: Any, ref: Any, job: Job, sweep: Path) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
        return outcome
    except ray.exceptions.OutOfMemoryError:
        message = (
            f"Ray ended it, as its node ran out of memory: set resources.memory_gib above {job.resources.memory_gib:g}"
        )
    except ray.exceptions.RayError as error:
        message = f"Ray lost it: {first_line(error)}"
    outcome = Outcome("failed", message)
    note(sweep, job.key, outcome)
    return outcome


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise WinnowError('launcher=ray needs Ray: pip install "moe-winnow[ray]"') from error
    return ray


def _check_nodes(ray: Any, root: Path, sweep: Path) -> None:
    """Raises WinnowError where a node does not see the output folder, or has no winnow, or another version."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    probes = [
        ray.remote(_seen)
        .options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        )
        .remote(str(sweep.resolve()))
        for node in nodes
    ]
    here = version(PACKAGE)
    for node, probe in zip(nodes, probes, strict=True):
        name = node["NodeManagerHostname"]
        try:
            seen, there = ray.get(probe, timeout=60)
        except ray.exceptions.RayError as error:
            raise WinnowError(f"node {name} cannot run winnow: {first_line(error)}; install it there") from error
        if there != here:
            raise WinnowError(f"node {name} has winnow {there}, and this machine {here}: install the same on all")
        if not seen:
            raise WinnowError(f"node {name} does not see {root}: choose an output_dir on a folder that all nodes share")


def _seen(sweep: str) -> tuple[bool, str]:
    return (Path(sweep) / "sweep.json").is_file(), version(PACKAGE)


def _check_room(ray: Any, jobs: Sequence[Job]) -> None:
    """Raises WinnowError where no node has what a job takes: it would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for job in jobs:
        wanted = {"CPU": job.resources.cpus, "GPU": job.resources.gpus, "memory": job.resources.memory_gib * _GIB}
        if any(all(node.get(name, 0) >= much for name, much in wanted.items()) for node in nodes):
            continue
        best = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        raise WinnowError(
            f"{job.label} takes {wanted['GPU']} GPUs, {wanted['CPU']} cores and {job.resources.memory_gib:g} GiB, and "
            f"no node has that (at most {best['GPU']:g} GPUs, {best['CPU']:g} cores, {best['memory'] / _GIB:.3g} GiB): "
            "set resources.gpus, resources.cpus or resources.memory_gib"
        )
