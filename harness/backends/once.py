"""Tasks that ask a model the same (HumanEval and HumanEval+) get the answers that were written once."""

from collections.abc import Sequence
from typing import Any

from harness.backends.tokens import stops_by_prompt
from harness.contracts.backend import Backend, Sampling


class Once:
    """``generate`` of a backend, which it takes the place of, asked only for what no earlier call has been answered.

    A request is the same where prompt, ``max_new_tokens`` and stop strings are. Sampled texts are always written: what
    is drawn depends on a prompt's place in its call. ``shared`` counts the answers that were there already.
    """

    def __init__(self, backend: Backend) -> None:
        self._generate, self.shared = backend.generate, 0
        self._known: dict[tuple[str, int, tuple[str, ...]], str] = {}
        backend.generate = self  # type: ignore[method-assign]

    def __call__(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        """As the backend's own ``generate``; what is left to be asked goes to it in one call, in the order given."""
        if sampling is not None:
            return self._generate(prompts, max_new_tokens, stop, sampling, progress=progress)
        stops = stops_by_prompt(stop, len(prompts))
        requests = [(prompt, max_new_tokens, texts) for prompt, texts in zip(prompts, stops, strict=True)]
        new = [place for place, request in enumerate(requests) if request not in self._known]
        if new:
            one_for_all = all(isinstance(text, str) for text in stop)
            left: Any = stop if one_for_all else [stops[place] for place in new]
            written = self._generate([prompts[place] for place in new], max_new_tokens, left, progress=progress)
            self._known |= {requests[place]: text for place, text in zip(new, written, strict=True)}
        self.shared += len(requests) - len(new)
        return [self._known[request] for request in requests]
