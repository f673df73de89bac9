"""vLLM against transformers, on the same tiny checkpoints: plain, pruned, merged, non-uniform and ragged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.backends import vllm_guard
from harness.backends.hf import HFBackend
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.backend import Sampling
from harness.errors import WinnowError
from tests.harness.backends.vllm_served import (
    PLANS,
    PROMPTS,
    edited,
    fitting,
    made,
    needs_vllm,
    quiet_engine_in_this_process,
    served,
    standin_bytes,
)
from tests.tiny import FAMILY_NAMES

pytestmark = [needs_vllm, pytest.mark.usefixtures(quiet_engine_in_this_process.__name__)]

COMPACT_FAMILIES = (*FAMILY_NAMES, "qwen2_moe")
IN_GROUPS = ("plain", "merged", "constants", "stand-ins")  # as many rows in each of two router groups
CHECKPOINTS = [
    *((family, kind) for family in COMPACT_FAMILIES for kind in PLANS),
    *(("deepseek_v3", kind) for kind in IN_GROUPS),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("served")
    return {(family, kind): made(family, kind, root) for family, kind in CHECKPOINTS}


@pytest.mark.parametrize(("family", "kind"), CHECKPOINTS)
def test_the_same_tokens_and_log_likelihoods_as_transformers(
    checkpoints: dict[tuple[str, str], Path], family: str, kind: str
) -> None:
    folder = checkpoints[family, kind]
    arguments = vllm_guard.check(folder)
    assert bool(arguments) == (family == "deepseek_v3")
    hf = HFBackend(load_model(folder, "float32"), load_tokenizer(folder), max_length=256)
    pairs = [(prompt, ending) for prompt in PROMPTS for ending in (" and so", "7", " \n")] + [("", "abc")]
    with served(folder, **arguments) as vllm:
        assert vllm.generate(PROMPTS, 24) == hf.generate(PROMPTS, 24)
        theirs, ours = vllm.loglikelihood(pairs), hf.loglikelihood(pairs)
        assert [r.logprob for r in theirs] == pytest.approx([r.logprob for r in ours], abs=1e-3)
        assert [r.tokens for r in theirs] == [r.tokens for r in ours]
        documents = [*PROMPTS, "x", "", "a long one " * 10]
        theirs, ours = vllm.loglikelihood_rolling(documents), hf.loglikelihood_rolling(documents)
        assert [r.logprob for r in theirs] == pytest.approx([r.logprob for r in ours], abs=1e-3)
        assert [r.tokens for r in theirs] == [r.tokens for r in ours]
        standing = standin_bytes(folder)
        held = vllm.facts["expert_bytes"] - standing
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_layout_of_vllms_main_branch(checkpoints: dict[tuple[str, str], Path], family: str, tmp_path: Path) -> None:
    """Experts that keep their old numbers, in a vLLM that does not know this."""
    plan = fitting(PLANS["constants"], family)
    apply_plan(checkpoints[family, "plain"], plan, tmp_path / "out", "vllm_constants")
    hf = HFBackend(load_model(tmp_path / "out", "float32"), load_tokenizer(tmp_path / "out"), max_length=256)
    with served(tmp_path / "out", **vllm_guard.check(tmp_path / "out")) as vllm:
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
