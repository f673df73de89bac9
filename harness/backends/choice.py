"""Which backend ``backend=auto`` takes. The rule, in order:

1. transformers where vLLM cannot serve the model right (``vllm_guard.reason_against``), where as many GPUs as were
   asked for cannot share it, or where vLLM is of a version that was not tried;
2. transformers where nothing is to be written (``suite=none`` and suites that only score);
3. on GPUs: vLLM;
4. on a CPU: vLLM where the tokens to write, times the parameters that each of them uses, are ``WORTH_A_START`` or more.
   Its start-up takes longer there than a small suite or a small model does; ``python -m harness.speed.generation``
   measures where the two meet on the reference MoE.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness.backends import vllm_guard
from harness.contracts.task import Task
from harness.errors import WinnowError

WORTH_A_START = 500_000 * 1_574_912  # so many tokens of the reference MoE


def choose(
    backend: Mapping[str, Any], model_config: Mapping[str, Any], tasks: Iterable[Task], active: Callable[[], int]
) -> tuple[Any, str]:
    """The node of the backend to take, and why (empty where it was asked for by name).

    ``backend`` is the configuration's: of one backend, or of ``auto`` with both under it; ``active`` gives the
    parameters that a token uses. Raises WinnowError where vLLM was asked for and cannot serve the model right.
    """
    reason = ""
    if backend["name"] != "hf":
        devices = int(backend.get("vllm", backend).get("open", {}).get("tensor_parallel_size") or 1)
        reason = vllm_guard.reason_against(model_config) or vllm_guard.reason_against_sharing(model_config, devices)
    if backend["name"] != "auto":
        if reason:
            raise WinnowError(f"backend=vllm: {reason}")
        return backend, ""
    if reason or (reason := vllm_guard.reason_against_version()):
        return backend["hf"], reason
    work = sum(task.tokens_to_write() for task in tasks)
    if not work:
        return backend["hf"], "the suite writes nothing"
    if not vllm_guard.is_cpu_build():
        return backend["vllm"], "vLLM is installed and serves this architecture"
    least = -(-WORTH_A_START // active())
    counted = f"up to {work:,} tokens to write on a CPU, and vLLM's start-up pays from {least:,} on"
    return backend["vllm" if work >= least else "hf"], counted
