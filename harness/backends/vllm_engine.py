"""The child process of ``backend=vllm``: one vLLM engine that answers requests on a socket until it is closed.

Started by ``harness.backends.vllm`` as ``python -m harness.backends.vllm_engine FD``. Requests and answers are pickled
tuples: ("start", options), ("run", sequences, settings); answers ("ready", facts), ("done", place, answer) for each
sequence as it finishes, ("failed", text).
"""

import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any


def start(options: dict[str, Any]) -> Any:
    """The engine. ``options`` are those of vLLM's ``LLM``."""
    from harness.backends import vllm_plugin

    vllm_plugin.register()  # also where the entry point is not installed or VLLM_PLUGINS leaves it out
    from vllm import LLM

    return LLM(**options)


def facts(engine: Any) -> dict[str, Any]:
    """What the engine holds: longest sequence, and the bytes of the routed experts' matrices as they lie in memory."""
    import vllm

    def bytes_of_experts(model: Any) -> int:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        experts = (module for module in model.modules() if isinstance(module, RoutedExperts))
        return sum(p.nbytes for module in experts for p in module.parameters())

    return {
        "version": vllm.__version__,
        "max_length": engine.llm_engine.model_config.max_model_len,
        "max_logprobs": engine.llm_engine.model_config.max_logprobs,
        "expert_bytes": sum(engine.apply_model(bytes_of_experts)),
    }


def run(engine: Any, sequences: list[list[int]], settings: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """(place, answer) of each sequence of tokens as it finishes.

    An answer is (new tokens, log-probabilities of the prompt's tokens): the latter, where asked for, are a list with,
    for each token but the first, {token: log-probability} of itself and of the likeliest.
    """
    from vllm import SamplingParams

    core = engine.llm_engine
    for place, (tokens, chosen) in enumerate(zip(sequences, settings, strict=True)):
        core.add_request(str(place), {"prompt_token_ids": tokens}, SamplingParams(**chosen))
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                logprobs = output.prompt_logprobs and [
                    {token: value.logprob for token, value in position.items()}
                    for position in output.prompt_logprobs[1:]
                ]
                yield int(output.request_id), (list(output.outputs[0].token_ids), logprobs)


def serve(connection: Connection) -> None:
    engine: Any = None
    while True:
        try:
            kind, *arguments = connection.recv()
        except EOFError:  # closed by the other side
            return
        try:
            if kind == "start":
                engine = start(*arguments)
                connection.send(("ready", facts(engine)))
            else:
                for place, answer in run(engine, *arguments):
                    connection.send(("done", place, answer))
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))
            raise


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
