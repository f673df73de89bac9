"""The vLLM backend: an offline engine in a process of its own, started once a cell and shared by its tasks.

The engine's memory is gone when the backend is closed, and a crash of it is an error of the cell alone. Compact
checkpoints are served at their true size by ``harness.backends.vllm_plugin``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from harness.backends import timed, vllm_guard
from harness.backends.ending import before_end, end_marks, end_tokens, end_tokens_of
from harness.backends.thinking import thinking_options
from harness.backends.tokens import (
    Request,
    cut,
    decode,
    encode,
    has_chat_template,
    prompt_text,
    prompts_that_fit,
    scoring_requests,
    stops_by_prompt,
    thought_marks,
    windows,
)
from harness.backends.vllm_engine import scoring
from harness.backends.vllm_process import EngineProcess
from harness.checkpoints.config import read_config
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.quantize import served_facts, served_folder
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.backend import Distributions, LogLikelihood, Sampling, TokenLogprobs
from harness.errors import WinnowError
from harness.progress import bar as progress_bar

# On so few cores one thread is the fastest: several wait for each other, and for the scheduler beside them. It is not
# bound to a core, on which the engine of a cell at its side would run too. On more cores vLLM arranges its threads.
FEW_CORES = 4
RESERVED = 1  # tokens beside the longest sequence: of one that is scored the engine always writes another


class Engine(Protocol):
    """A vLLM engine: ``facts`` of ``vllm_engine.facts``, and the answers of ``vllm_engine.run`` as they come."""

    facts: dict[str, Any]

    def run(self, sequences: list[list[int]], settings: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]: ...

    def close(self) -> None: ...


class VLLMBackend:
    """Writing and scoring with a vLLM engine. ``ends``: the end tokens (default: those that the tokenizer tells)."""

    name = "vllm"

    def __init__(self, engine: Engine, tokenizer: Any, ends: frozenset[int] | None = None) -> None:
        self.tokenizer, self._engine, self.facts = tokenizer, engine, engine.facts
        self.ends = end_tokens(tokenizer) if ends is None else ends
        self._end_marks, self._marks = end_marks(tokenizer), thought_marks(tokenizer)
        self.facts["end_tokens"] = sorted(self.ends)
        self.max_length: int = self.facts["max_length"]
        self.has_chat_template = has_chat_template(tokenizer)
        self.seconds = {"generate": 0.0, "score": 0.0}

    def close(self) -> None:
        """End the engine; its memory is free afterwards."""
        self._engine.close()

    def prompt(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
        """The text or messages as the model reads them (``tokens.prompt_text``)."""
        return prompt_text(self.tokenizer, prompt, options)

    def thinking_options(self, wanted: str) -> dict[str, Any]:
        """What turns thinking "on" or "off" in this model's chat template (``thinking.thinking_options``)."""
        return thinking_options(self.tokenizer, wanted)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        """Continuations of at most ``max_new_tokens`` tokens, cut before a stop string or end of text.

        Greedy where ``sampling`` is None. A prompt that leaves no room for them is cut on the left.
        """
        encoded = prompts_that_fit(self.tokenizer, prompts, max_new_tokens, self.max_length)
        stops = stops_by_prompt(stop, len(prompts), self._end_marks)
        settings = [
            {
                "max_tokens": max_new_tokens,
                "stop": list(texts),
                "include_stop_str_in_output": True,
                "stop_token_ids": sorted(self.ends),
            }
            | _sampling(sampling, place)
            for place, texts in enumerate(stops)
        ]
        answers = [""] * len(encoded)
        with timed(self.seconds, "generate"):
            for place, (tokens, _) in self._run(encoded, settings, progress):
                written = before_end(tokens, self.ends)
                answers[place] = cut(decode(self.tokenizer, encoded[place], written, self._marks), stops[place])
        return answers

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        """The log-likelihood of each continuation, tokenized with its context as ``tokens.scoring_requests`` says."""
        results = [LogLikelihood(0.0, 0)] * len(pairs)
        for request, _, logprobs in self._of_continuations(pairs, 0, progress):
            results[request.index] = LogLikelihood(sum(logprobs[:, 0].tolist()), len(logprobs))
        return results

    def loglikelihood_rolling(self, texts: Sequence[str], progress: str = "") -> list[LogLikelihood]:
        """The log-likelihood of every token of each text but the first.

        In windows as ``HFBackend`` has them, but two tokens shorter: the engine takes no longer prompt.
        """
        parts = [
            (i, part)
            for i, tokens in enumerate(encode(self.tokenizer, texts))
            for part in windows(tokens, self.max_length - 2)
        ]
        logprobs, counts = [0.0] * len(texts), [0] * len(texts)
        scored = self._scored([part for _, part in parts], [1] * len(parts), 0, progress)
        for (i, _), (_, scores) in zip(parts, scored, strict=True):
            logprobs[i] += sum(scores[:, 0].tolist())
            counts[i] += len(scores)
        return [LogLikelihood(*both) for both in zip(logprobs, counts, strict=True)]

    def token_logprobs(self, texts: Sequence[str], top: int, progress: str = "") -> list[TokenLogprobs]:
        """For every token of each text but the first: its log-probability, and the ``top`` likeliest tokens instead.

        Raises WinnowError for a text that is longer than the model's length.
        """
        encoded = encode(self.tokenizer, texts)
        longest = max(map(len, encoded), default=0)
        limit = int(self.facts["max_logprobs"])
        if longest >= self.max_length or not 1 <= top <= limit:
            raise WinnowError(
                f"top={top}, longest text of {longest} tokens: needs 1 to {limit} and at most {self.max_length - 1}"
            )
        results = [TokenLogprobs.empty(tokens, top) for tokens in encoded]
        places = [i for i, tokens in enumerate(encoded) if len(tokens) > 1]
        for i, positions in zip(places, self.score_tokens([encoded[i] for i in places], top, progress), strict=True):
            ranked = [sorted(position.items(), key=lambda item: -item[1])[:top] for position in positions]
            results[i] = TokenLogprobs(
                np.array(encoded[i][1:]),
                np.array([position[token] for token, position in zip(encoded[i][1:], positions, strict=True)]),
                np.array([[token for token, _ in best] for best in ranked]),
                np.array([[logprob for _, logprob in best] for best in ranked]),
            )
        return results

    def distributions(
        self, pairs: Sequence[tuple[str, str]], positions: int, progress: str = ""
    ) -> Iterator[tuple[int, Distributions]]:
        """For each (context, continuation) the ``max_logprobs`` likeliest tokens at the first ``positions`` places of
        the continuation, tokenized as ``loglikelihood`` does."""
        top = int(self.facts["max_logprobs"]) if positions else 0
        for request, *scores in self._of_continuations(pairs, top, progress):
            along = _by_token(*scores)
            ranked = [sorted(place.items(), key=lambda item: -item[1])[:top] for place in along[:positions]]
            width = min(map(len, ranked), default=0)
            likeliest = np.array([best[:width] for best in ranked], dtype=np.float64).reshape(len(ranked), width, 2)
            yield (
                request.index,
                Distributions(
                    np.array(request.continuation),
                    np.array([place[token] for token, place in zip(request.continuation, along, strict=True)]),
                    likeliest[..., 1],
                    likeliest[..., 0].astype(np.int64),
                ),
            )

    def score_tokens(self, sequences: list[list[int]], top: int, progress: str = "") -> list[list[dict[int, float]]]:
        """For each sequence and each of its tokens but the first, {token: log-probability} of the token itself and of
        the ``top`` likeliest there. A sequence has at most ``max_length`` - 1 tokens."""
        return [_by_token(*scores) for scores in self._scored(sequences, [1] * len(sequences), top, progress)]

    def _scored(
        self, sequences: list[list[int]], firsts: list[int], top: int, progress: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """``vllm_engine.scores`` of each sequence from its token number ``firsts[place]`` on."""
        settings = [scoring(first, top) for first in firsts]
        answers: list[Any] = [None] * len(sequences)
        with timed(self.seconds, "score"):
            for place, (_, scores) in self._run(sequences, settings, progress):
                answers[place] = scores
        return answers

    def _of_continuations(
        self, pairs: Sequence[tuple[str, str]], top: int, progress: str
    ) -> list[tuple[Request, np.ndarray, np.ndarray]]:
        """Each pair's tokens (``tokens.scoring_requests``), and the scores of its continuation."""
        requests = list(scoring_requests(self.tokenizer, pairs, self.max_length - 1))
        sequences, firsts = [[*r.context, *r.continuation] for r in requests], [len(r.context) for r in requests]
        scored = self._scored(sequences, firsts, top, progress)
        return [(request, *scores) for request, scores in zip(requests, scored, strict=True)]

    def _run(
        self, sequences: list[list[int]], settings: list[dict[str, Any]], progress: str
    ) -> Iterator[tuple[int, Any]]:
        room = self.facts.get("engine_length", self.max_length)
        longest = max(
            (len(s) + one.get("max_tokens", RESERVED) for s, one in zip(sequences, settings, strict=True)), default=0
        )
        if longest > room:
            raise WinnowError(
                f"a sequence of {longest} tokens, where the engine keeps room for {room}: a task told that it needs no "
                "more; give backend.open.max_length"
            )
        largest = max((token for tokens in sequences for token in tokens), default=0)
        if largest >= self.facts.get("vocabulary", largest + 1):
            raise WinnowError(
                f"token {largest} is outside the model's vocabulary of {self.facts['vocabulary']}: the tokenizer is "
                "another's"
            )
        answers = self._engine.run(sequences, settings) if sequences else iter(())
        return iter(progress_bar(progress, len(sequences), answers))


def _by_token(tokens: np.ndarray, logprobs: np.ndarray) -> list[dict[int, float]]:
    """{token: log-probability} at each place."""
    return [dict(zip(*both, strict=True)) for both in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def _sampling(sampling: Sampling | None, place: int) -> dict[str, Any]:
    if sampling is None:
        return {"temperature": 0.0}
    seed = int(np.random.default_rng([sampling.seed, place]).integers(2**31))
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}


def open_checkpoint(
    folder: str,
    dtype: str,
    device: Any,
    max_length: int | None = None,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    kv_cache_gib: float | None = None,
    max_logprobs: int = 128,
    start_seconds: float = 1800,
    engine: dict[str, Any] | None = None,
    longest: int | None = None,
) -> VLLMBackend:
    """The backend of ``backend=vllm`` on the checkpoint in ``folder``.

    ``device`` is the installed build's: the CPU build of vLLM runs on the CPU, the other on GPUs. ``kv_cache_gib``:
    size of the KV cache (default: 1 on a CPU, what ``gpu_memory_utilization`` leaves on a GPU). ``engine``: more
    arguments of vLLM's ``LLM``, which win over the ones made here. ``longest``: tokens of the longest sequence that it
    will be asked for, prompt and answer; without a ``max_length`` the engine reserves room for no more (default: for
    what the model takes). It changes no answer: what the model takes stays what texts are cut and windowed by.

    Raises WinnowError where vLLM is not installed, the checkpoint cannot be served right (``vllm_guard``), or the
    engine does not start.
    """
    path = resolve_checkpoint(folder)
    faults, config = vllm_guard.check(path), read_config(path)
    on_cpu = vllm_guard.is_cpu_build()
    if kv_cache_gib is None and on_cpu:
        kv_cache_gib = 1.0
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max_length,
        **({} if longest is None else {"longest": longest + RESERVED}),
        "tensor_parallel_size": tensor_parallel_size,
        "max_logprobs": max_logprobs,
        "enable_prefix_caching": True,
        **({"enforce_eager": True} if on_cpu else {"gpu_memory_utilization": gpu_memory_utilization}),
        **({} if kv_cache_gib is None else {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}),
        **faults,
        **(engine or {}),
    }
    options = vllm_guard.engine_arguments(config, options)
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    if options["tensor_parallel_size"] == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this child process is enough
    threads = os.environ.get("OMP_NUM_THREADS") or ("1" if (os.cpu_count() or 1) <= FEW_CORES else "")
    if on_cpu and threads:
        binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment |= {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": binding}
    environment |= vllm_guard.environment(config)
    tokenizer = load_tokenizer(path)
    ends = end_tokens_of(path, tokenizer)
    with served_folder(path) as served:  # the engine has read it once it has started
        engine_process = EngineProcess(served, options, environment, start_seconds)
    backend = VLLMBackend(engine_process, tokenizer, ends)
    backend.facts |= served_facts(path)
    return backend
