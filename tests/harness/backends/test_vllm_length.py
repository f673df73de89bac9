"""vLLM with room for the longest sequence that it is asked for, and no more: no answer changes by it."""

import json
from pathlib import Path

import pytest

from harness.backends import vllm_guard
from harness.backends.hf import HFBackend
from harness.backends.vllm import RESERVED, open_checkpoint
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.errors import WinnowError
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(vllm_guard.installed_version() is None, reason="vLLM is not installed: `make vllm`")

PROMPT, TEXT = "def f(x):", "the old mill by the river, and the miller's daughter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("length")
    save_tiny(made, "qwen3_moe", hidden=128)
    return made


def test_room_for_the_longest_sequence_and_no_more(folder: Path) -> None:
    limit = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    longest = len(TEXT.encode())  # a token a byte
    backend = open_checkpoint(str(folder), "float32", "cpu", kv_cache_gib=0.05, longest=longest)
    try:
        assert backend.max_length == backend.facts["max_length"] == limit
        assert backend.facts["engine_length"] == longest + RESERVED
        hf = HFBackend(load_model(folder, "float32"), load_tokenizer(folder))
        assert hf.max_length == limit
        room = longest - len(PROMPT)
        assert backend.generate([PROMPT], room) == hf.generate([PROMPT], room)
        (ours,), (theirs,) = backend.loglikelihood_rolling([TEXT]), hf.loglikelihood_rolling([TEXT])
        assert ours.tokens == theirs.tokens == longest - 1 and ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        for too_long in (
            lambda: backend.generate([PROMPT], room + 2),
            lambda: backend.loglikelihood([("x", TEXT)] * 2),
        ):
            with pytest.raises(
                WinnowError, match=rf"sequence of {longest + 2} tokens.*room for {longest + 1}.*max_length"
            ):
                too_long()
    finally:
        backend.close()


def test_a_need_beyond_the_model_is_the_models_own_limit(folder: Path) -> None:
    from harness.backends.vllm_engine import within

    limit = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    given = {"model": str(folder), "dtype": "float32", "max_model_len": None}
    assert within(given | {"longest": 10**7}) == (given | {"max_model_len": limit}, {"max_length": limit})
    assert within(given | {"longest": 40}) == (given | {"max_model_len": 40}, {"max_length": limit})
    assert within(given) == (given, {})
    asked = given | {"max_model_len": 64}
    assert within(asked | {"longest": 40}) == (asked, {})
