"""What is asked of vLLM to score texts, and what comes back: the log-probabilities that are needed, and no others."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness.backends import vllm_engine
from harness.backends.hf import HFBackend
from harness.backends.tokens import scoring_requests
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.errors import WinnowError
from tests.harness.backends.vllm_served import (
    PROMPTS,
    made,
    needs_vllm,
    quiet_engine_in_this_process,
    served,
)

pytestmark = [needs_vllm, pytest.mark.usefixtures(quiet_engine_in_this_process.__name__)]

PAIRS = [(prompt * 3, ending) for prompt in PROMPTS for ending in (" and so", "7")] + [("", "abc")]


def by_hand(engine: Any, tokens: list[int], top: int) -> list[dict[int, float]]:
    """{token: log-probability} of every token but the first, through vLLM's public call, all of them."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top)
    (answer,) = engine.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
    return [{token: value.logprob for token, value in place.items()} for place in answer.prompt_logprobs[1:]]


def test_scores_are_those_of_all_tokens_and_only_the_continuations_travel(tmp_path: Path) -> None:
    folder = made("qwen3_moe", "plain", tmp_path)
    with served(folder) as vllm:
        requests = list(scoring_requests(vllm.tokenizer, PAIRS, vllm.max_length - 1))
        sequences, sent = [[*r.context, *r.continuation] for r in requests], []
        ask = vllm._engine.run

        def recorded(*asked: Any) -> Any:
            for place, answer in ask(*asked):
                sent.append((place, answer))
                yield place, answer

        vllm._engine.run = recorded
        found = vllm.loglikelihood(PAIRS)
        assert all(answer[1][1].size == len(requests[place].continuation) for place, answer in sent)
        assert len(pickle.dumps(sent)) < 1000 * len(sent)
        for request, tokens, answer in zip(requests, sequences, found, strict=True):
            places = by_hand(vllm._engine.engine, tokens, 0)[-len(request.continuation) :]
            logprobs = [place[token] for token, place in zip(request.continuation, places, strict=True)]
            assert (answer.logprob, answer.tokens) == (sum(logprobs), len(logprobs))
        for tokens, places in zip(sequences, vllm.score_tokens(sequences, 3), strict=True):
            assert places == by_hand(vllm._engine.engine, tokens, 3)
        assert vllm.score_tokens([[5]], 2) == [[]]


def test_the_second_runner_is_told_which_tokens_to_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the request as valid, row by row; an answer as vLLM describes it is read right.

    The runner itself needs a GPU: its answers are made here from those of the first one.
    """
    folder, tokens, first = made("qwen3_moe", "plain", tmp_path), list(range(40, 70)), 21
    with served(folder) as vllm:
        core = vllm._engine.engine.llm_engine
        places = by_hand(vllm._engine.engine, tokens, 0)
        assert vllm_engine._parameters(core, tokens, first).prompt_logprob_token_ids is None
        monkeypatch.setattr(type(core.vllm_config), "use_v2_model_runner", True)
        asked = vllm_engine._parameters(core, tokens, first)
        assert asked.prompt_logprobs is None
        processed = core.input_processor.process_inputs(
            "0", {"type": "token", "prompt_token_ids": tokens}, asked, supported_tasks=("generate",)
        )
        rows = processed.sampling_params.prompt_logprob_token_ids
        assert rows.tolist() == [[token] for token in tokens[first:]]
        assert processed.sampling_params.prompt_logprob_start == first - 1, "row i predicts token i + 1"
        assert vllm_engine._parameters(core, tokens, first, top=2).prompt_logprobs == 2
        assert vllm_engine._parameters(core, [5], 1).prompt_logprobs == 0, "no row is left to be asked for"
    scored = np.array([[places[i][tokens[i + 1]]] for i in range(first - 1, len(tokens) - 1)], dtype=np.float32)
    output = SimpleNamespace(prompt_token_ids=tokens, prompt_logprobs=None, prompt_token_id_logprobs=scored)
    own, logprobs = vllm_engine.scores(output, first)
    assert own.tolist() == rows.tolist()
    assert logprobs[:, 0].tolist() == [
        place[token] for token, place in zip(tokens[first:], places[first - 1 :], strict=True)
    ]
    output.prompt_token_id_logprobs = None
    with pytest.raises(RuntimeError, match="no log-probabilities"):
        vllm_engine.scores(output, first)


def test_a_tokenizer_with_more_tokens_than_the_model_is_told(tmp_path: Path) -> None:
    """As the transformers backend tells it."""
    folder = made("qwen3_moe", "plain", tmp_path)
    tokenizer = load_tokenizer(folder)
    with served(folder) as vllm:
        assert tokenizer.add_tokens([f"<new{i}>" for i in range(400)]) == 400
        vllm.tokenizer = tokenizer
        hf = HFBackend(load_model(folder, "float32"), tokenizer, max_length=256)
        for backend in (vllm, hf):
            for ask in (lambda b: b.generate(["a<new399>"], 4), lambda b: b.loglikelihood([("a<new399>", "b")])):
                with pytest.raises(WinnowError, match=r"^token \d+ is outside the model's vocabulary of 300"):
                    ask(backend)
        assert vllm.generate(["a"], 4) == hf.generate(["a"], 4)
