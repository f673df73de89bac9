"""The child process of ``backend=vllm``: one vLLM engine that answers requests on a socket until it is closed.

Started by ``harness.backends.vllm`` as ``python -m harness.backends.vllm_engine FD``. Requests and answers are pickled
tuples: ("start", options), ("run", sequences, settings); answers ("ready", facts), ("done", place, answer) for each
sequence as it finishes, ("failed", text).
"""

import sys
from collections.abc import Iterator
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

WORKER_EXTENSION = "harness.backends.vllm_worker.Extension"


def start(options: dict[str, Any]) -> Any:
    """The engine. ``options`` are those of vLLM's ``LLM``."""
    from harness.backends import vllm_plugin

    vllm_plugin.register()  # also where the entry point is not installed or VLLM_PLUGINS leaves it out
    from vllm import LLM

    return LLM(**options | {"worker_extension_cls": WORKER_EXTENSION})


def within(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options with room for ``longest`` tokens a sequence, where they say that and no ``max_model_len``, and the
    fact of what the model itself takes: ``max_length``, as vLLM finds it."""
    options = dict(options)
    longest = options.pop("longest", None)
    if longest is None or options.get("max_model_len") is not None:
        return options, {}
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    arguments = EngineArgs(**{name: value for name, value in options.items() if name in known})
    limit = arguments.create_model_config().max_model_len
    return options | {"max_model_len": min(longest, limit)}, {"max_length": limit}


def facts(engine: Any) -> dict[str, Any]:
    """What the engine holds: the longest sequence that the model takes and the one that room is kept for, and the bytes
    of the routed experts' matrices as they lie in memory, those of all workers together."""
    import vllm

    return {
        "version": vllm.__version__,
        "max_length": engine.llm_engine.model_config.max_model_len,
        "engine_length": engine.llm_engine.model_config.max_model_len,
        "vocabulary": engine.llm_engine.model_config.get_vocab_size(),
        "max_logprobs": engine.llm_engine.model_config.max_logprobs,
        "expert_bytes": sum(engine.collective_rpc("winnow_expert_bytes")),
    }


def run(engine: Any, sequences: list[list[int]], settings: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """(place, answer) of each sequence of tokens as it finishes. ``settings`` are vLLM's, or those of ``scoring``.

    An answer is (new tokens, what ``scores`` gives or, where no scores were asked for, None).
    """
    core = engine.llm_engine
    scored = [chosen.get("first") for chosen in settings]
    for place, (tokens, chosen) in enumerate(zip(sequences, settings, strict=True)):
        core.add_request(str(place), {"prompt_token_ids": tokens}, _parameters(core, tokens, **chosen))
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                place = int(output.request_id)
                first = scored[place]
                yield place, (list(output.outputs[0].token_ids), None if first is None else scores(output, first))


def scoring(first: int, top: int) -> dict[str, Any]:
    """The settings that score a sequence's tokens from number ``first`` (at least 1) on, and the ``top`` likeliest in
    the place of each."""
    return {"first": first, "top": top}


def _parameters(core: Any, tokens: list[int], first: int | None = None, top: int = 0, **chosen: Any) -> Any:
    """vLLM's sampling parameters for a sequence.

    Scoring is greedy, and the engine always writes a token: one is, and is thrown away. Where only the tokens' own
    log-probabilities are wanted, vLLM's second model runner (the one that it takes on GPUs) is told from which token
    on, and computes no others. Its first runner, the only one of the CPU build, knows nothing of the kind and computes
    them all. The second was not run here: tests show that vLLM accepts such requests, and how an answer is read.
    """
    from vllm import SamplingParams

    if first is None:
        return SamplingParams(**chosen)
    greedy: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    if top == 0 and first < len(tokens) and getattr(core.vllm_config, "use_v2_model_runner", False):
        wanted = np.array(tokens[first:])[:, None]
        return SamplingParams(**greedy, prompt_logprob_token_ids=wanted, prompt_logprob_start=first - 1)
    return SamplingParams(**greedy, prompt_logprobs=top, flat_logprobs=True)


def scores(output: Any, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [P, 1 + top] and their log-probabilities, likewise, at the P places from token ``first`` on: the token
    itself, then the likeliest in its place, likeliest first."""
    own = np.array(output.prompt_token_ids[first:], dtype=np.int64)[:, None]
    if not len(own):
        return own, np.zeros((0, 1), dtype=np.float32)
    flat = output.prompt_logprobs
    if flat is None:
        if output.prompt_token_id_logprobs is None:
            raise RuntimeError("vLLM gave no log-probabilities for a sequence that was to be scored")
        return own, np.asarray(output.prompt_token_id_logprobs, dtype=np.float32)
    start = flat.start_indices[first]
    tokens = np.array(flat.token_ids[start:], dtype=np.int64).reshape(len(own), -1)
    return tokens, np.array(flat.logprobs[start:], dtype=np.float32).reshape(len(own), -1)


def serve(connection: Connection) -> None:
    engine: Any = None
    while True:
        try:
            kind, *arguments = connection.recv()
        except EOFError:  # closed by the other side
            return
        try:
            if kind == "start":
                options, length = within(*arguments)
                engine = start(options)
                connection.send(("ready", facts(engine) | length))
            else:
                for place, answer in run(engine, *arguments):
                    connection.send(("done", place, answer))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))
            raise


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
