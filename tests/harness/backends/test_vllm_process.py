"""The process that a vLLM engine lives in: its death, its closing and its last words."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.backends import vllm_process
from harness.backends.hf import HFBackend
from harness.backends.vllm_process import CHECKPOINT, EngineProcess, workplace
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.errors import WinnowError
from tests.harness.backends.vllm_served import PROMPTS, alive_in_group, made, needs_vllm, open_tiny
from tests.harness.checkpoints.compressed import merged, pruned


@needs_vllm
def test_an_engine_in_a_process_of_its_own_and_its_death(tmp_path: Path) -> None:
    folder = made("qwen3_moe", "merged", tmp_path)
    hf = HFBackend(load_model(folder, "float32"), load_tokenizer(folder), max_length=256)
    backend = open_tiny(folder)
    try:
        assert backend.facts["version"].startswith("0.32") and backend.max_length == 256
        assert backend.generate(PROMPTS, 16) == hf.generate(PROMPTS, 16)
        process = backend._engine._process
        threading.Thread(target=lambda: (time.sleep(0.3), process.kill())).start()
        with pytest.raises(WinnowError, match="the vLLM engine has stopped: signal 9"):
            while True:
                backend.generate(PROMPTS * 50, 200)
        with pytest.raises(WinnowError, match="the vLLM engine has stopped"):
            backend.generate(PROMPTS, 4)
    finally:
        backend.close()
    assert process.poll() is not None and not alive_in_group(process.pid)


@needs_vllm
def test_a_cache_too_small_for_the_length_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="lower max_length or raise kv_cache_gib"):
        open_tiny(made("qwen3_moe", "plain", tmp_path), max_length=2048, kv_cache_gib=0.0005)


@needs_vllm
def test_compiled_code_is_shared_by_what_has_one_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own hash, under which it keeps what it compiled, of the checkpoint as an engine sees it."""
    from vllm.engine.arg_utils import EngineArgs

    plain = made("qwen3_moe", "plain", tmp_path)
    plans = {
        "five": pruned([0, 2, 3, 6, 7], [1, 2, 3, 4, 7]),
        "five others": pruned([1, 2, 3, 6, 7], [0, 2, 3, 4, 7]),
        "six": pruned([0, 2, 3, 5, 6, 7], [1, 2, 3, 4, 6, 7]),
        "merged": merged([[0, 3], [1, 2], [5, 7], [4, 6]], [[0, 4], [1, 2], [3, 5], [6, 7]]),
        "merged to five": merged([[0, 3], [1], [2], [5, 7], [4, 6]], [[0, 4], [1, 2], [3], [5], [6, 7]]),
    }

    def compiled(folder: Path, **options: Any) -> str:
        with workplace(folder) as place, monkeypatch.context() as there:
            there.chdir(place)
            arguments = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 2**25, **options}
            return str(EngineArgs(model=CHECKPOINT, **arguments).create_engine_config().compute_hash())

    found = {"plain": compiled(plain)}
    for name, plan in plans.items():
        apply_plan(plain, plan, tmp_path / name)
        found[name] = compiled(tmp_path / name)
    assert found["five"] == found["five others"]
    assert len(set(found.values())) == len(found) - 1
    assert compiled(tmp_path / "five", dtype="bfloat16") != found["five"]


# Engines that behave badly


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(vllm_process, "ENGINE", "tests.harness.backends.stuck_engine")
    monkeypatch.setattr(vllm_process.vllm_guard, "is_cpu_build", lambda: True)

    def open_engine(how: str, start_seconds: float = 60) -> EngineProcess:
        options = {"how": how, "told": str(tmp_path / "told"), "tensor_parallel_size": 2}
        return EngineProcess(tmp_path, options, {}, start_seconds)

    return open_engine


@pytest.mark.parametrize("how", ["is stuck", "leaves its worker"])
def test_nothing_of_an_engine_is_left_that_does_not_end(
    how: str, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_process, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(vllm_process, "LEFT_OVER_SECONDS", 0.3)
    engine = opened(how)
    group = engine._process.pid
    worker = int((tmp_path / "told").read_text())
    assert {group, worker} <= alive_in_group(group)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10
    assert not alive_in_group(group) and engine._process.poll() is not None


def test_an_engine_that_ends_slowly_ends_by_itself(opened: Any, tmp_path: Path) -> None:
    assert vllm_process.CLOSE_SECONDS > 3 * 14.5, "14.5 s were measured with two workers on a busy machine"
    engine = opened("is slow")
    engine.close()
    assert (tmp_path / "told").read_text() == "ended by itself" and engine._process.returncode == 0


def test_an_engine_that_does_not_start_is_killed_at_once(opened: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WinnowError, match="did not start within start_seconds=3"):
        opened("never starts", start_seconds=3)
    assert time.monotonic() - started < 20
    worker = int((tmp_path / "told").read_text())
    assert not alive(worker)


def test_the_fault_of_a_worker_is_told_and_not_that_there_was_one(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"vLLM: not enough GPU memory: .*\(ValueError: Free memory on device cuda:1"):
        opened("fails")
    assert not alive(int((tmp_path / "told").read_text()))


@pytest.mark.parametrize(("devices", "asked"), [(1, "cuda"), (2, "auto")])
def test_an_engine_has_its_gpus_alone(
    devices: int, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def alone_on(device: str) -> Iterator[None]:
        events.append(device)
        yield
        events.append("free")

    monkeypatch.setattr(vllm_process, "ENGINE", "no.such.module")
    monkeypatch.setattr(vllm_process.vllm_guard, "is_cpu_build", lambda: False)
    monkeypatch.setattr(vllm_process, "alone_on", alone_on)
    with pytest.raises(WinnowError, match=r"the vLLM engine has stopped: exit code 1; .*No module named 'no'"):
        EngineProcess(tmp_path, {"tensor_parallel_size": devices}, {}, 60)
    assert events == [asked, "free"]


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
