"""Where a model's text ends: one list of end tokens for every engine. Free of torch and of vLLM."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.backends.tokens import has_chat_template, thought_mark_names
from harness.checkpoints.config import read_config, read_generation_config

# Stands as the whole answer of a conversation, to see what the chat template puts behind it.
ANSWER = "[[the-answer-ends-here]]"


def end_tokens(tokenizer: Any, *configs: Mapping[str, Any]) -> frozenset[int]:
    """Every token that ends a text: those that the tokenizer and the configs (config.json, generation_config.json) call
    ``eos_token_id``, and what the chat template puts behind an answer."""
    declared = [{"eos_token_id": tokenizer.eos_token_id}, *configs]
    return frozenset([*(token for config in declared for token in _declared(config)), *_turn_end(tokenizer)])


def end_tokens_of(folder: Path, tokenizer: Any) -> frozenset[int]:
    """``end_tokens`` of a checkpoint. Raises WinnowError where its config files cannot be read."""
    return end_tokens(tokenizer, read_config(folder), read_generation_config(folder))


def before_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first end token: some are not marked as special and would show in the text."""
    return list(tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))])


def _declared(config: Mapping[str, Any]) -> Iterator[int]:
    """One token or a list of them, also in the part of a config that is about text."""
    found = config.get("eos_token_id")
    for token in found if isinstance(found, (list, tuple)) else [found]:
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            yield token
    if isinstance(config.get("text_config"), Mapping):
        yield from _declared(config["text_config"])


def _turn_end(tokenizer: Any) -> Iterator[int]:
    """The added token right behind an answer of the assistant, if any.

    A template that refuses so short a conversation has none: it says so itself when a task asks in messages.
    """
    if not has_chat_template(tokenizer):
        return
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, answered, behind = str(tokenizer.apply_chat_template(asked, tokenize=False)).rpartition(ANSWER)
    except Exception:  # of the template's own code
        return
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.content}
    found = max((text for text in added if behind.lstrip().startswith(text)), key=len, default="") if answered else ""
    # In gpt-oss the mark that ends a thought also ends answers that are followed by more.
    if found and found not in thought_mark_names(tokenizer):
        yield added[found]
