"""From documents to the token sequences of a calibration pass."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.backends.template import apply_template
from harness.backends.tokens import beginning_of_texts
from harness.data.rows import Document
from harness.errors import WinnowError, first_line

log = logging.getLogger(__name__)


_ENCODE_AT_ONCE = 1000


@dataclass(frozen=True)
class TokenSequence:
    """What the model sees at once: one or more whole documents (or pieces of them), one after the other.

    ``input_ids`` is (L,) int64; ``lengths`` holds the tokens of each document in it and adds up to L;
    ``sources`` holds one label for each of them. Attention never crosses from one document into the next.
    """

    input_ids: np.ndarray
    lengths: tuple[int, ...]
    sources: tuple[str, ...]


def tokenize(
    documents: Sequence[Document],
    tokenizer: Any,
    max_length: int,
    packing: bool = False,
    chat_template: bool | str = False,
    max_blocks: int | None = None,
    bos: bool | str = "auto",
) -> list[TokenSequence]:
    """Token sequences of at most ``max_length`` tokens; documents without a token are left out.

    With ``bos`` "auto" a plain text begins with the token with which the tokenizer itself begins texts, if any, as it
    does in evaluation; false leaves it out. A chat template writes its own beginning.
    Unpacked: each document on its own, cut on the right. Packed: documents run on from block to block, so every block
    but the last is full; a document that crosses the edge goes on in the next block as a document of its own (at most
    ``max_blocks`` blocks). With ``chat_template``, documents with messages go through the tokenizer's chat template;
    where it has none, "auto" takes their plain text, with a warning. Raises WinnowError where True finds no template,
    and where no token is left.
    """
    if max_length < 1:
        raise WinnowError(f"calibration.max_length must be at least 1, not {max_length}")
    if max_blocks is not None and (not packing or max_blocks < 1):
        raise WinnowError(
            "calibration.max_blocks limits the blocks of a packed corpus: set packing=true and at least 1"
        )
    if bos not in ("auto", False):
        raise WinnowError(f"calibration.bos must be auto or false, not '{bos}'")
    if not documents:
        raise WinnowError("the calibration corpus is empty: it has no documents")
    through_template = _template_is_used(documents, tokenizer, chat_template)
    texts = _texts(documents, tokenizer, through_template, bos == "auto")
    encoded = _encode(texts, tokenizer)
    tokens = [(ids, d.source) for ids, d in zip(encoded, documents, strict=True) if ids]
    if not tokens:
        raise WinnowError(f"the calibration corpus is empty: none of its {len(documents)} documents has a token")
    if len(tokens) < len(documents):
        empty = len(documents) - len(tokens)
        log.warning("%d of %d calibration documents are empty and left out", empty, len(documents))
    if packing:
        return _pack(tokens, max_length, max_blocks)
    return [_sequence([(ids[:max_length], source)]) for ids, source in tokens]


def corpus_fingerprint(sequences: Iterable[TokenSequence]) -> str:
    """sha256 over token ids, document boundaries and sources: all that a pass depends on but the model."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(json.dumps([sequence.lengths, sequence.sources]).encode())
        digest.update(sequence.input_ids.astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()}"


def _template_is_used(documents: Sequence[Document], tokenizer: Any, chat_template: bool | str) -> bool:
    """Whether documents with messages go through the tokenizer's template. Raises WinnowError where they cannot."""
    if chat_template not in (True, False, "auto"):
        raise WinnowError(f"calibration.chat_template must be true, false or auto, not '{chat_template}'")
    if not chat_template or tokenizer.chat_template:
        return bool(chat_template)
    with_messages = sum(bool(document.messages) for document in documents)
    if with_messages and chat_template is True:
        raise WinnowError(
            "calibration.chat_template=true, but the model's tokenizer has no chat template: set it to false for the "
            "plain text of the messages, or add a chat_template.jinja to the model's folder"
        )
    if with_messages:
        log.warning("the tokenizer has no chat template: %d documents with messages are plain text", with_messages)
    return False


def _texts(documents: Sequence[Document], tokenizer: Any, through_template: bool, begin: bool) -> list[str]:
    """What the tokenizer is given of each document."""
    first = beginning_of_texts(tokenizer) if begin else ""
    texts, folded = [], 0
    for document in documents:
        if not (through_template and document.messages):
            # An empty document stays one.
            texts.append(
                f"{first}{document.text}" if document.text and not document.text.startswith(first) else document.text
            )
            continue
        text, without_system = _templated(document, tokenizer)
        texts.append(text)
        folded += without_system
    if folded:
        log.warning(
            "the chat template has no place for system turns: those of %d documents begin their first user turn", folded
        )
    return texts


def _templated(document: Document, tokenizer: Any) -> tuple[str, bool]:
    """The document in the chat template, and whether its system turns had to go into the first user turn for it."""
    turns = [{"role": role, "content": content} for role, content in document.messages]
    try:
        return apply_template(tokenizer, turns), False
    except Exception as error:  # of the template's own code
        folded = _system_folded(turns)
        with suppress(Exception):
            if folded is not None:
                return apply_template(tokenizer, folded), True
        raise WinnowError(
            f"{document.where or 'a document'}: the tokenizer's chat template refuses it ({first_line(error)}): mend "
            "the row, or set calibration.chat_template=false"
        ) from error


def _system_folded(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]] | None:
    """The turns with what the system says before the first words of the user; None where there is no such pair."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    others = [dict(turn) for turn in turns if turn["role"] != "system"]
    user = next((turn for turn in others if turn["role"] == "user"), None)
    if not system or user is None:
        return None
    user["content"] = "\n\n".join([*system, user["content"]])
    return others


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    encoded: list[list[int]] = []
    for start in range(0, len(texts), _ENCODE_AT_ONCE):
        some = list(texts[start : start + _ENCODE_AT_ONCE])
        encoded.extend(tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])
    return encoded


def _pack(tokens: Sequence[tuple[list[int], str]], size: int, max_blocks: int | None) -> list[TokenSequence]:
    blocks: list[list[tuple[list[int], str]]] = [[]]
    room = size
    for ids, source in tokens:
        while ids:
            if room == 0:
                blocks.append([])
                room = size
            blocks[-1].append((ids[:room], source))
            ids, room = ids[room:], room - len(ids[:room])
        if max_blocks is not None and len(blocks) > max_blocks:
            break
    return [_sequence(block) for block in blocks[:max_blocks]]


def _sequence(pieces: Sequence[tuple[list[int], str]]) -> TokenSequence:
    return TokenSequence(
        np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in pieces]),
        tuple(len(ids) for ids, _ in pieces),
        tuple(source for _, source in pieces),
    )
