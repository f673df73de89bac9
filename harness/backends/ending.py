"""Where a model's text ends: one list of end tokens for every engine. Free of torch and of vLLM."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.backends.template import apply_template
from harness.backends.tokens import has_chat_template, thought_mark_names, token_of
from harness.checkpoints.config import read_config, read_generation_config

# Stands as the whole answer of a conversation, to see what the chat template puts behind it.
ANSWER = "[[the-answer-ends-here]]"
# How marks are written: <|im_end|>, </s>, [/INST].
_MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")


def end_tokens(tokenizer: Any, *configs: Mapping[str, Any]) -> frozenset[int]:
    """Every token that ends a text: those that the tokenizer and the configs (config.json, generation_config.json) call
    ``eos_token_id``, and what the chat template puts behind an answer."""
    turn_end = token_of(tokenizer, _turn_end(tokenizer))
    declared = ({"eos_token_id": tokenizer.eos_token_id}, *configs, {"eos_token_id": turn_end})
    return frozenset(token for config in declared for token in _declared(config))


def end_marks(tokenizer: Any) -> tuple[str, ...]:
    """What ends a text beside tokens: the mark that the chat template puts behind an answer, where it is none."""
    mark = _turn_end(tokenizer)
    return (mark,) if mark and token_of(tokenizer, mark) is None else ()


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


def _turn_end(tokenizer: Any) -> str:
    """The mark right behind an answer of the assistant: an added token, or what is written like one; "" where there is
    none.

    A template that refuses so short a conversation has none: it says so itself when a task asks in messages.
    """
    if not has_chat_template(tokenizer):
        return ""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, answered, behind = apply_template(tokenizer, asked).rpartition(ANSWER)
    except Exception:  # of the template's own code
        return ""
    behind = behind.lstrip() if answered else ""
    written = _MARK.match(behind)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if behind.startswith(token.content)]
    found = max(added, key=len, default="") or (written[0] if written else "")
    # In gpt-oss the mark that ends a thought also ends answers that are followed by more.
    return "" if found in thought_mark_names(tokenizer) else found
