"""Tiny checkpoints for vLLM, and engines in this process, because a start of its own for each would take minutes."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from harness.backends import vllm_guard
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.standins import standin_shapes
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.plan import CompressionPlan
from harness.families.table import family_of
from tests.harness.checkpoints.compressed import constants_plan, merged, pruned, ragged_plan, standins_plan
from tests.tiny import save_tiny

needs_vllm = pytest.mark.skipif(vllm_guard.installed_version() is None, reason="vLLM is not installed: `make vllm`")

HIDDEN = 128
PROMPTS = ["once upon a time", "12 apples and 7", "def f(x):", "zz", "the old mill\n"]
PLANS = {
    "plain": None,
    "pruned": pruned([0, 2, 3, 6, 7], [1, 2, 3, 4, 7]),
    "merged": merged([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]], permute=True),
    "other numbers by layer": pruned([0, 2, 6], [1, 2, 3, 4, 5, 7]),
    "ragged": ragged_plan(),
    "constants": constants_plan(HIDDEN),
    "stand-ins": standins_plan(HIDDEN),
}
# What a checkpoint of the hub states, and transformers does not write.
STATED = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}


class InProcess:
    """What ``EngineProcess`` is, without a process of its own."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from harness.backends import vllm_engine

        self.engine = vllm_engine.start(
            {
                "model": str(folder), "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**25,
                "max_model_len": 256, "max_logprobs": 32, **options,
            }
        )  # fmt: skip
        self.facts = vllm_engine.facts(self.engine)

    def run(self, sequences: list[list[int]], settings: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        from harness.backends import vllm_engine

        return vllm_engine.run(self.engine, sequences, settings)

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def new_memory_holds_nan() -> Iterator[None]:
    """So that a parameter of which a part is never written shows in every output."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    from harness.backends.vllm import VLLMBackend

    environment = vllm_guard.environment(read_config(folder))
    with new_memory_holds_nan(), patch.dict(os.environ, environment):
        engine = InProcess(folder, **options)
    backend = VLLMBackend(engine, load_tokenizer(folder))
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture(scope="module")
def quiet_engine_in_this_process() -> Iterator[None]:
    """Import it into the module of a test that has an engine in this process."""
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def fitting(plan: CompressionPlan, family: str) -> CompressionPlan:
    """The plan with the numbers that the MoE layers of the tiny model have."""
    numbers = {"qwen2_moe": (1, 5), "deepseek_v3": (1, 2)}.get(family, (0, 1))
    return replace(plan, layers=tuple(replace(layer, layer=numbers[layer.layer]) for layer in plan.layers))


def made(family: str, kind: str, root: Path) -> Path:
    """A tiny checkpoint of a kind of ``PLANS``, made in ``root`` where it is not there yet."""
    plain = root / family / "plain"
    if not plain.exists():
        save_tiny(plain, family, hidden=HIDDEN)
        config = read_config(plain) | STATED.get(family, {})
        (plain / "config.json").write_text(json.dumps(config))
    plan, folder = PLANS[kind], root / family / kind
    if plan is not None and not folder.exists():
        apply_plan(plain, fitting(plan, family), folder)
    return folder


def standin_bytes(folder: Path) -> int:
    """Those of constants and maps in float32, each with a shift."""
    config = read_config(folder)
    family = family_of(config)
    found = 0
    for layer, layout in layer_layouts(config, family).items():
        shifted = replace(layout, low_rank=tuple(replace(one, shift=True) for one in layout.low_rank))
        shapes = standin_shapes(family, layer, shifted, config["hidden_size"])
        found += sum(4 * prod(shape) for shape in shapes.values())
    return found


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config.json."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
    return target


def open_tiny(folder: Path, **options: Any) -> Any:
    from harness.backends.vllm import open_checkpoint

    return open_checkpoint(str(folder), "float32", "cpu", **{"max_length": 256, "kv_cache_gib": 0.05, **options})


def alive_in_group(group: int) -> set[int]:
    """The processes of a process group that have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, of_group, *_ = stat.read_text().rpartition(")")[2].split()
            if int(of_group) == group and state != "Z":
                found.add(int(stat.parent.name))
    return found
