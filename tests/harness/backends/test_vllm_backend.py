"""vLLM against transformers, on the same tiny checkpoints: plain, pruned, merged, non-uniform and ragged.

The engine runs in this process, because a start of its own for each checkpoint would take minutes; the child process
that cells use has tests of its own at the end.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.backends import vllm_guard
from harness.backends.hf import HFBackend
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.backend import Sampling
from harness.contracts.plan import CompressionPlan
from harness.errors import WinnowError
from tests.harness.checkpoints.compressed import merged, pruned, ragged_plan
from tests.tiny import FAMILY_NAMES, save_tiny

pytestmark = pytest.mark.skipif(vllm_guard.installed_version() is None, reason="vLLM is not installed: `make vllm`")

PROMPTS = ["once upon a time", "12 apples and 7", "def f(x):", "zz", "the old mill\n"]
PLANS = {
    "plain": None,
    "pruned": pruned([0, 2, 3, 6, 7], [1, 2, 3, 4, 7]),
    "merged": merged([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]], permute=True),
    "other numbers by layer": pruned([0, 2, 6], [1, 2, 3, 4, 5, 7]),
    "ragged": ragged_plan(),
}
COMPACT_FAMILIES = (*FAMILY_NAMES, "qwen2_moe")
CHECKPOINTS = [(family, kind) for family in COMPACT_FAMILIES for kind in PLANS]


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

    with new_memory_holds_nan():
        engine = InProcess(folder, **options)
    backend = VLLMBackend(engine, load_tokenizer(folder))
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture(scope="module", autouse=True)
def quiet_engine_in_this_process() -> Iterator[None]:
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
    numbers = {"qwen2_moe": (1, 5)}.get(family, (0, 1))
    return replace(plan, layers=tuple(replace(layer, layer=numbers[layer.layer]) for layer in plan.layers))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("served")
    for family in COMPACT_FAMILIES:
        save_tiny(root / family / "plain", family, hidden=128)
        for kind, plan in PLANS.items():
            if plan is not None:
                apply_plan(root / family / "plain", fitting(plan, family), root / family / kind)
    return {(family, kind): root / family / kind for family, kind in CHECKPOINTS}


@pytest.mark.parametrize(("family", "kind"), CHECKPOINTS)
def test_the_same_tokens_and_log_likelihoods_as_transformers(
    checkpoints: dict[tuple[str, str], Path], family: str, kind: str
) -> None:
    folder = checkpoints[family, kind]
    assert vllm_guard.check(folder) == {}
    hf = HFBackend(load_model(folder, "float32"), load_tokenizer(folder), max_length=256)
    pairs = [(prompt, ending) for prompt in PROMPTS for ending in (" and so", "7", " \n")] + [("", "abc")]
    with served(folder) as vllm:
        assert vllm.generate(PROMPTS, 24) == hf.generate(PROMPTS, 24)
        theirs, ours = vllm.loglikelihood(pairs), hf.loglikelihood(pairs)
        assert [r.logprob for r in theirs] == pytest.approx([r.logprob for r in ours], abs=1e-3)
        assert [r.tokens for r in theirs] == [r.tokens for r in ours]
        documents = [*PROMPTS, "x", "", "a long one " * 10]
        theirs, ours = vllm.loglikelihood_rolling(documents), hf.loglikelihood_rolling(documents)
        assert [r.logprob for r in theirs] == pytest.approx([r.logprob for r in ours], abs=1e-3)
        assert [r.tokens for r in theirs] == [r.tokens for r in ours]
        held = vllm.facts["expert_bytes"]
        stored = sum(p.nbytes for n, p in hf.model.named_parameters() if ".experts." in n)
        # The CPU kernel pads every width to a multiple of 32.
        widths = {p.shape[-1] for n, p in hf.model.named_parameters() if n.endswith("experts.down_proj")}
        assert held == stored * 32 / widths.pop() if len(widths) == 1 else stored <= held <= 8 * stored


def test_all_router_rows_chosen_where_some_share_an_expert(
    checkpoints: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """More experts a token than there are."""
    whole = edited(checkpoints["qwen2_moe", "plain"], tmp_path / "whole", num_experts_per_tok=8)
    apply_plan(whole, fitting(PLANS["merged"], "qwen2_moe"), tmp_path / "merged")
    hf = HFBackend(load_model(tmp_path / "merged", "float32"), load_tokenizer(whole), max_length=256)
    with served(tmp_path / "merged") as vllm:
        assert vllm.generate(PROMPTS, 24) == hf.generate(PROMPTS, 24)


def test_options_of_generation(checkpoints: dict[tuple[str, str], Path]) -> None:
    folder = checkpoints["qwen3_moe", "merged"]
    hf = HFBackend(load_model(folder, "float32"), load_tokenizer(folder), max_length=256)
    with served(folder) as vllm:
        free = hf.generate(PROMPTS, 30)
        stops = [[free[0][4:6]], [], [free[2][7], free[2][5]], [], [free[4][3:5]]]
        assert vllm.generate(PROMPTS, 30, stops) == hf.generate(PROMPTS, 30, stops) != free
        assert vllm.generate(PROMPTS, 30, [free[1][3]]) == hf.generate(PROMPTS, 30, [free[1][3]])
        drawn = vllm.generate(PROMPTS, 12, sampling=Sampling(1.0, seed=1))
        assert vllm.generate(PROMPTS, 12, sampling=Sampling(1.0, seed=1)) == drawn
        assert vllm.generate(PROMPTS, 12, sampling=Sampling(1.0, seed=2)) != drawn
        for theirs, ours in zip(
            vllm.token_logprobs([*PROMPTS, "x"], 5), hf.token_logprobs([*PROMPTS, "x"], 5), strict=True
        ):
            assert theirs.tokens.tolist() == ours.tokens.tolist()
            assert theirs.top_tokens.shape == ours.top_tokens.shape
            assert abs(theirs.logprobs - ours.logprobs).max(initial=0) < 1e-3
            assert abs(theirs.top_logprobs - ours.top_logprobs).max(initial=0) < 1e-3
        pairs = [(prompt, ending) for prompt in PROMPTS[:2] for ending in (" and so on", "7")]
        whole = dict(hf.distributions(pairs, 3))
        for place, likeliest in vllm.distributions(pairs, 3):
            assert likeliest.tokens.tolist() == whole[place].tokens.tolist()
            assert abs(likeliest.logprobs - whole[place].logprobs).max() < 1e-3
            assert likeliest.expected.shape == (min(3, len(likeliest.tokens)), 32)
            same = np.take_along_axis(whole[place].expected, likeliest.expected_tokens, 1)
            assert abs(likeliest.expected - same).max() < 1e-3
            assert (np.diff(likeliest.expected) <= 0).all()
        assert {place: found.expected.shape for place, found in vllm.distributions(pairs, 0)} == dict.fromkeys(
            range(4), (0, 0)
        )
        assert vllm.generate([], 4) == vllm.loglikelihood([]) == vllm.loglikelihood_rolling([]) == []
        with pytest.raises(WinnowError, match="top=99"):
            vllm.token_logprobs(["ab"], 99)
        with pytest.raises(WinnowError, match="max_new_tokens=256"):
            vllm.generate(["a"], 256)
        assert vllm.seconds["generate"] > 0 and vllm.seconds["score"] > 0


def test_routes_on_another_version_are_refused(
    checkpoints: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_guard, "installed_version", lambda: "0.33.1")
    with pytest.raises(WinnowError, match=r"need vLLM 0\.32\.x, and 0\.33\.1 is installed"):
        vllm_guard.check(checkpoints["mixtral", "merged"])
    assert vllm_guard.check(checkpoints["mixtral", "pruned"]) == {}, "plain checkpoints need no plugin"


STOCK = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model=folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**25, max_model_len=256)
assert "harness" not in sys.modules
asked = [{"prompt_token_ids": tokens} for tokens in prompts]
written = llm.generate(asked, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
print(json.dumps([list(answer.outputs[0].token_ids) for answer in written]))
"""


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pruned_checkpoints_are_plain_ones_for_stock_vllm(
    checkpoints: dict[tuple[str, str], Path], family: str
) -> None:
    folder = checkpoints[family, "pruned"]
    tokenizer = load_tokenizer(folder)
    tokens = [tokenizer.encode(prompt) for prompt in PROMPTS]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder), json.dumps(tokens)],
        env=os.environ | {"VLLM_PLUGINS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(done.stdout.splitlines()[-1])
    hf = HFBackend(load_model(folder, "float32"), tokenizer, max_length=256)
    assert [tokenizer.decode(answer, skip_special_tokens=True) for answer in written] == hf.generate(PROMPTS, 16)


# The child process


def test_two_engines_on_one_gpu_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from harness.backends.vllm import _this_gpu_alone

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"test{os.getpid()}")
    entered = threading.Event()

    def second() -> None:
        with _this_gpu_alone():
            entered.set()

    with _this_gpu_alone():
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.5)
    waiting.join(10)
    assert entered.is_set() and "waiting for the GPU" in caplog.text


def open_tiny(folder: Path, **options: Any) -> Any:
    from harness.backends.vllm import open_checkpoint

    return open_checkpoint(str(folder), "float32", "cpu", **{"max_length": 256, "kv_cache_gib": 0.05, **options})


def test_an_engine_in_a_process_of_its_own_and_its_death(checkpoints: dict[tuple[str, str], Path]) -> None:
    folder = checkpoints["qwen3_moe", "merged"]
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
    assert process.poll() is not None


def test_a_cache_too_small_for_the_length_says_what_to_do(checkpoints: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(WinnowError, match="lower max_length or raise kv_cache_gib"):
        open_tiny(checkpoints["qwen3_moe", "plain"], max_length=2048, kv_cache_gib=0.0005)


# The guard


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config.json."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
    return target


def test_experts_narrower_than_announced_are_caught(checkpoints: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """vLLM would leave the rest of each expert uninitialised."""
    folder = edited(checkpoints["qwen3_moe", "plain"], tmp_path / "wide", moe_intermediate_size=32)
    with pytest.raises(WinnowError, match="has shape"):
        vllm_guard.check(folder)


def test_gate_values_that_vllm_would_not_renormalise_are_caught(
    checkpoints: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = edited(checkpoints["olmoe", "plain"], tmp_path / "normed", norm_topk_prob=True)
    with pytest.raises(WinnowError, match="norm_topk_prob=False"):
        vllm_guard.check(folder)


def test_a_shared_expert_that_vllm_would_cut_is_caught(tmp_path: Path) -> None:
    config = {"model_type": "glm4_moe", "moe_intermediate_size": 16, "n_shared_experts": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.zeros(64, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        WinnowError, match="has 64 rows, but moe_intermediate_size x n_shared_experts of config.json is 32"
    ):
        vllm_guard.check(tmp_path)


def test_architectures_with_known_faults_are_refused_or_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in ("phimoe", "lfm2_moe", "minimax_m2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(WinnowError, match=f"architecture '{model_type}'"):
            vllm_guard.check(tmp_path)
    assert "was not tried with vLLM" in vllm_guard.reason_against({"model_type": "qwen3_next"})
    assert vllm_guard.reason_against({"model_type": "granitemoe"}) == ""
    assert "layout=expanded" in vllm_guard.reason_against({"model_type": "granitemoe", "winnow": {}})
    assert "topk_method" in vllm_guard.reason_against({"model_type": "deepseek_v3", "scoring_func": "sigmoid"})
    monkeypatch.setattr(vllm_guard, "find_spec", lambda name: None)
    assert "not installed: install it with" in vllm_guard.reason_against({"model_type": "mixtral"})
