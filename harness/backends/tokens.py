"""What every backend does with texts and tokens before and after the model runs. Free of torch and of vLLM."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.backends.template import apply_template
from harness.errors import WinnowError, first_line

log = logging.getLogger(__name__)

# Stands at the end of an answer that the model is to go on with, until the chat template has been applied.
OPEN_END = "[[the-answer-goes-on-here]]"
# Prompt tokens decoded along with an answer, because some tokenizers drop the space that begins a text.
DECODE_CONTEXT = 8
# Marks around what a model thinks aloud: kept in its text also where its tokenizer calls them special.
THOUGHT_MARKS = {
    "<think>": "</think>", "<thinking>": "</thinking>", "<thought>": "</thought>", "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>", "[THINK]": "[/THINK]", "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>", "<|begin_of_thought|>": "<|end_of_thought|>",
}  # fmt: skip
CHANNEL, CHANNEL_MARKS = "<|channel|>", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")  # of gpt-oss


@dataclass(frozen=True)
class Request:
    """A continuation to score: its place in the answer, the tokens before it, and its own."""

    index: int
    context: tuple[int, ...]
    continuation: list[int]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def beginning_of_texts(tokenizer: Any) -> str:
    """The mark with which the tokenizer itself begins every text; empty where it adds none."""
    first = tokenizer.bos_token
    adds = first is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return str(first) if adds else ""


def prompt_text(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
    """What a model reads: a plain text behind the beginning-of-text token that its tokenizer would add, or messages as
    its chat template writes them, ready for the answer. A last message of the assistant stays open to be gone on with.

    ``options`` go to the template (such as ``enable_thinking``). Raises WinnowError where there is no template, and
    where it refuses the messages.
    """
    if isinstance(prompt, str):
        first = beginning_of_texts(tokenizer)
        return prompt if prompt.startswith(first) else f"{first}{prompt}"
    if not has_chat_template(tokenizer):
        raise WinnowError("the model's tokenizer has no chat template: take chat=false")
    messages = [dict(message) for message in prompt]
    goes_on = messages[-1]["role"] == "assistant"
    if goes_on:
        messages[-1]["content"] += OPEN_END
    try:
        text = apply_template(tokenizer, messages, add_generation_prompt=not goes_on, **options)
    except Exception as error:  # of the template's own code
        raise WinnowError(
            f"the model's chat template refuses the task's messages ({first_line(error)}): take chat=false"
        ) from error
    return text.partition(OPEN_END)[0]


def thought_marks(tokenizer: Any) -> dict[int, str]:
    """{token: mark} of the marks around thoughts that decoding would leave out as special tokens."""
    known = [(token_of(tokenizer, mark), mark) for mark in thought_mark_names(tokenizer)]
    return {n: mark for n, mark in known if n is not None and not tokenizer.decode([n], skip_special_tokens=True)}


def thought_mark_names(tokenizer: Any) -> tuple[str, ...]:
    """What marks a thought in texts of this tokenizer."""
    marks = (*THOUGHT_MARKS, *THOUGHT_MARKS.values())
    return marks if token_of(tokenizer, CHANNEL) is None else (*marks, *CHANNEL_MARKS)


def token_of(tokenizer: Any, text: str) -> int | None:
    """The token that is this text, None where there is none (tokenizers then give None or their unknown token)."""
    token = tokenizer.convert_tokens_to_ids(text)
    return token if token is not None and tokenizer.convert_ids_to_tokens(token) == text else None


def decode(tokenizer: Any, prompt: list[int], tokens: list[int], marks: Mapping[int, str]) -> str:
    """The text that ``tokens`` add to ``prompt``, without special tokens but for ``marks`` (``thought_marks``)."""
    pieces: list[str] = []
    before, start = prompt, 0
    for place in (place for place, token in enumerate(tokens) if token in marks):
        pieces += [_decode(tokenizer, before, tokens[start:place]), marks[tokens[place]]]
        before, start = [tokens[place]], place + 1
    return "".join([*pieces, _decode(tokenizer, before, tokens[start:])])


def _decode(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    before = prompt[-DECODE_CONTEXT:]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    start: str = tokenizer.decode(before, **options)
    both: str = tokenizer.decode(before + tokens, **options)
    if both.startswith(start):
        return both[len(start) :]
    alone: str = tokenizer.decode(tokens, **options)
    return alone


def beginning(tokenizer: Any) -> int:
    """The token that stands for an empty context. Raises WinnowError where the tokenizer has none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise WinnowError("an empty context needs a beginning- or end-of-text token, and the tokenizer has neither")


def prompts_that_fit(tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, max_length: int) -> list[list[int]]:
    """The tokens of each prompt, cut on the left, with a warning, where no room is left for ``max_new_tokens``."""
    room = max_length - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise WinnowError(
            f"max_new_tokens={max_new_tokens}: choose between 1 and {max_length - 1}, one less than the model's length"
        )
    encoded = encode(tokenizer, prompts)
    if longer := sum(len(tokens) > room for tokens in encoded):
        log.warning(
            "%d of %d prompts lose their beginning: %d tokens and an answer of %d are more than the model's %d",
            longer, len(prompts), max(map(len, encoded)), max_new_tokens, max_length,
        )  # fmt: skip
    return [(tokens or [beginning(tokenizer)])[-room:] for tokens in encoded]


def scoring_requests(tokenizer: Any, pairs: Sequence[tuple[str, str]], max_tokens: int) -> Iterator[Request]:
    """(context, continuation) as tokens, tokenized together as lm-eval does.

    Spaces at the end of a context go to the continuation, and the tokens of both together are split where the tokens
    of the context alone end. An empty context is the beginning-of-text (or end-of-text) token. Both together take
    at most ``max_tokens`` tokens: a context is cut on the left. Raises WinnowError for an empty continuation and for
    one that does not fit.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    whole = encode(tokenizer, [context + continuation for context, continuation in pairs])
    alone = dict(zip(set(contexts), encode(tokenizer, list(set(contexts))), strict=True))
    for i, (context, tokens) in enumerate(zip(contexts, whole, strict=True)):
        if len(pairs[i][0]) + len(pairs[i][1]) == len(context):
            raise WinnowError(f"request {i}: the continuation to score is empty")
        # A merge across the border may leave the context more tokens than both together have.
        split = min(len(alone[context]), len(tokens) - 1)
        before, continuation = tokens[:split] or [beginning(tokenizer)], tokens[split:]
        if len(continuation) >= max_tokens:
            raise WinnowError(
                f"request {i}: a continuation of {len(continuation)} tokens is longer than max_length="
                f"{max_tokens - 1}; raise max_length or shorten the text"
            )
        yield Request(i, tuple(before[-(max_tokens - len(continuation)) :]), continuation)


def windows(tokens: list[int], size: int) -> list[list[int]]:
    """Stretches of at most ``size`` + 1 tokens that each begin with the last token of the one before.

    Scoring all tokens of each stretch but its first scores every token but the text's first once.
    """
    return [tokens[start : start + size + 1] for start in range(0, len(tokens) - 1, size)]


def stops_by_prompt(
    stop: Sequence[str] | Sequence[Sequence[str]], prompts: int, more: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """The stop strings of each prompt: ``stop`` is one list for all of them, or one list for each; ``more`` are in all.

    Raises WinnowError for an empty stop string, and where there are not as many lists as prompts.
    """
    shared = all(isinstance(text, str) for text in stop)
    lists = [tuple(stop)] * prompts if shared else [tuple(texts) for texts in stop]
    if len(lists) != prompts:
        raise WinnowError(f"{len(lists)} lists of stop strings for {prompts} prompts: give one list, or one for each")
    if any("" in texts for texts in lists):
        raise WinnowError("an empty stop string would end every answer at once: leave it out")
    return [(*texts, *more) for texts in lists]  # type: ignore[arg-type]


def cut(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop string in it."""
    ends = [text.find(mark) for mark in stop if mark in text]
    return text[: min(ends)] if ends else text
