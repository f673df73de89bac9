"""How many tokens a model would be asked for, counted by its tokenizer alone. Free of torch and of vLLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.backends.thinking import thinking_options
from harness.backends.tokens import encode, has_chat_template, prompt_text
from harness.checkpoints.config import model_length, read_config
from harness.checkpoints.tokenizer import load_tokenizer

CHUNK = 256  # texts tokenized at once
# A text is left uncounted where even a token for each of its bytes, and these more, would not make it the longest.
MORE = 8


class Counter:
    """A ``harness.contracts.backend.TokenCounter``. ``max_length``: the longest sequence that the model takes."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.has_chat_template = has_chat_template(tokenizer)

    def prompt(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
        """The text or messages as the model reads them (``tokens.prompt_text``)."""
        return prompt_text(self.tokenizer, prompt, options)

    def thinking_options(self, wanted: str) -> dict[str, Any]:
        """What turns thinking "on" or "off" in this model's chat template (``thinking.thinking_options``)."""
        return thinking_options(self.tokenizer, wanted)

    def longest(self, texts: Sequence[str]) -> int:
        """Tokens of the longest text; at least 1, since an empty one is read as one token."""
        most = 1
        for chunk in chunks(texts):
            if len(chunk[0].encode()) + MORE < most:
                break
            most = max(most, *map(len, encode(self.tokenizer, chunk)))
        return most

    def longest_pair(self, pairs: Sequence[tuple[str, str]]) -> int:
        """Tokens of the longest (context, continuation), tokenized as ``tokens.scoring_requests`` does; an empty
        context is one token."""
        with_context = [context + continuation for context, continuation in pairs if context.strip()]
        without = [context + continuation for context, continuation in pairs if not context.strip()]
        # A text of one token is all continuation, behind one that stands for its context.
        return max(2, self.longest(with_context), self.longest(without) + 1 if without else 0)


def chunks(texts: Sequence[str]) -> list[list[str]]:
    """The different texts, those of most bytes first."""
    ordered = sorted(set(texts), key=lambda text: -len(text.encode()))
    return [ordered[start : start + CHUNK] for start in range(0, len(ordered), CHUNK)]


def counter_of(folder: Path, max_length: int | None = None) -> Counter:
    """Of the checkpoint in ``folder``; ``max_length`` None: its own limit. Raises WinnowError as its tokenizer does."""
    return Counter(load_tokenizer(folder), max_length or model_length(read_config(folder)))
