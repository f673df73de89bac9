"""vLLM against transformers on the reference MoE and compressed versions: ``python -m harness.speed.agreement``.

Float32, greedy, prompts of code, math and writing. Two texts agree where they are the same up to the first place at
which the two likeliest tokens are within ``TIE`` nats of each other. Exits with status 1 where a bar is missed. Given
folders of checkpoints, it compares the engines on those instead.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from harness.backends.hf import HFBackend
from harness.backends.hf import open_checkpoint as open_hf
from harness.backends.tokens import encode
from harness.backends.vllm import open_checkpoint as open_vllm
from harness.speed.calibration import report
from harness.speed.variants import METHODS, checkpoints
from tasks.reference.items import evaluation_problems

TIE = 1e-3  # nats between the two likeliest tokens
MAX_DIFFERENCE = 1e-3  # nats of log-likelihood
MIN_IDENTICAL = 0.95
MAX_EXPERT_BYTES = 0.55  # of the baseline's, merged to half


@dataclass(frozen=True)
class Agreement:
    """``identical``: the share of texts; ``unexplained``: texts that part without a tie; ``difference``: the largest
    of a text's log-likelihood, in nats."""

    identical: float
    unexplained: int
    difference: float
    expert_bytes: int


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The first place at which two texts part, None where they do not."""
    if a == b:
        return None
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def is_tie(backend: HFBackend, prompt: str, text: str, place: int) -> bool:
    """Whether the two likeliest tokens at or before ``place`` of ``text`` after ``prompt`` are as good as equal."""
    start = len(encode(backend.tokenizer, [prompt])[0]) - 1
    best = backend.token_logprobs([prompt + text], top=2)[0].top_logprobs[start : start + place + 1]
    return bool(((best[:, 0] - best[:, 1]) < TIE).any())


def prompts(count: int) -> list[str]:
    """``count`` evaluation prompts, of code, math and writing in turn."""
    each = -(-count // 3)
    domains = ("code", "math", "writing")
    drawn = [[problem.prompt for problem in evaluation_problems(domain, each, 0)] for domain in domains]
    return list(chain.from_iterable(zip(*drawn, strict=True)))[:count]


def compared(checkpoint: Path, asked: list[str], tokens: int) -> Agreement:
    """Both engines on a checkpoint: ``tokens`` tokens after each of the prompts ``asked``, and their log-likelihood."""
    hf = open_hf(str(checkpoint), "float32", "cpu", 128, None)
    vllm = open_vllm(str(checkpoint), "float32", "cpu")
    try:
        ours, theirs = hf.generate(asked, tokens), vllm.generate(asked, tokens)
        pairs = list(zip(encode(hf.tokenizer, ours), encode(hf.tokenizer, theirs), strict=True))
        parted = [(i, first_difference(a, b)) for i, (a, b) in enumerate(pairs)]
        unexplained = [
            i for i, place in parted if place is not None and not is_tie(hf, asked[i], ours[i] or theirs[i], place)
        ]
        scored = list(zip(asked, [text or " " for text in ours], strict=True))
        both = zip(hf.loglikelihood(scored), vllm.loglikelihood(scored), strict=True)
        difference = max(abs(a.logprob - b.logprob) for a, b in both)
        identical = sum(place is None for _, place in parted) / len(asked)
        return Agreement(identical, len(unexplained), difference, vllm.facts["expert_bytes"])
    finally:
        vllm.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="The same tokens and log-likelihoods from vLLM and transformers.")
    parser.add_argument("checkpoints", nargs="*", type=Path, help="folders; none: the reference MoE, and compressed")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    asked, passed, expert_bytes = prompts(options.prompts), [], {}
    with tempfile.TemporaryDirectory() as folder:
        given = {str(path): path for path in options.checkpoints} or checkpoints(Path(folder))
        for name, checkpoint in given.items():
            found = compared(checkpoint, asked, options.tokens)
            expert_bytes[name] = found.expert_bytes
            print(
                f"{name}: {found.identical:.1%} identical, {found.unexplained} part where nothing was as good as "
                f"equal, experts of {found.expert_bytes:,} bytes in the engine"
            )
            passed += [
                report("texts that part without a tie", found.unexplained, 0, "texts"),
                report("texts that differ", 1 - found.identical, 1 - MIN_IDENTICAL, "of all"),
                report("log-likelihood of a text, largest difference", found.difference, MAX_DIFFERENCE, "nats"),
            ]
    if not options.checkpoints:
        for name in METHODS:
            print(f"{name}: {expert_bytes[name] / expert_bytes['baseline']:.2f} of the baseline's expert bytes")
        merged = expert_bytes["50 % merged"] / expert_bytes["baseline"]
        passed.append(report("expert bytes, 50 % merged, in the engine", merged, MAX_EXPERT_BYTES, "of the baseline"))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
