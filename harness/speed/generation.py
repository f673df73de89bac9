"""Tokens a second of vLLM against transformers: ``python -m harness.speed.generation``.

The reference MoE, uncompressed and with half of its experts pruned or merged; greedy, answers of up to ``--tokens``
tokens; as ratios within one run, with and without the time that a backend takes to be ready. The last line is what
``harness.backends.choice.WORTH_A_START`` stands for: how many tokens vLLM must write before its start has paid.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.backends.hf import HFBackend
from harness.backends.hf import open_checkpoint as open_hf
from harness.backends.tokens import encode
from harness.backends.vllm import VLLMBackend
from harness.backends.vllm import open_checkpoint as open_vllm
from harness.speed.agreement import prompts
from harness.speed.variants import checkpoints

BATCHES = (1, 16, 64)


@dataclass(frozen=True)
class Measured:
    """Seconds until a first request is answered; for each batch the seconds after that and the tokens written."""

    ready: float
    seconds: dict[int, float]
    written: dict[int, int]


def measure(opened: Callable[[], HFBackend | VLLMBackend], asked: list[str], tokens: int) -> Measured:
    started = time.perf_counter()
    backend = opened()
    backend.generate(asked[:1], 2)
    measured = Measured(time.perf_counter() - started, {}, {})
    for batch in BATCHES:
        started = time.perf_counter()
        answers = backend.generate(asked[:batch], tokens)
        measured.seconds[batch] = time.perf_counter() - started
        measured.written[batch] = sum(map(len, encode(backend.tokenizer, answers)))
    backend.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of vLLM against transformers on the reference MoE.")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    tokens = parser.parse_args().tokens
    asked = prompts(max(BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        found = checkpoints(Path(folder), ("50 % pruned", "50 % merged"))
        for name, path in found.items():
            hf = measure(partial(open_hf, str(path), "float32", "cpu", 128, None), asked, tokens)
            vllm = measure(partial(open_vllm, str(path), "float32", "cpu"), asked, tokens)
            print(f"{name}: ready after {hf.ready:.1f} s (transformers) and {vllm.ready:.1f} s (vLLM)")
            for batch in BATCHES:
                hf_speed, vllm_speed = (b.written[batch] / b.seconds[batch] for b in (hf, vllm))
                hf_whole, vllm_whole = (b.written[batch] / (b.ready + b.seconds[batch]) for b in (hf, vllm))
                ratio, with_start = vllm_speed / hf_speed, vllm_whole / hf_whole
                speeds = f"{hf_speed:5.0f} and {vllm_speed:5.0f} tokens/s"
                print(f"  batch {batch:2}: {speeds}, ratio {ratio:.2f}; with the start {with_start:.2f}")
            each_saved = 1 / hf_speed - 1 / vllm_speed  # seconds a token, at the largest batch
            if each_saved > 0:
                print(f"  vLLM's start has paid after {(vllm.ready - hf.ready) / each_saved:,.0f} tokens")
            else:
                print("  vLLM's start never pays: transformers writes faster here")


if __name__ == "__main__":
    main()
