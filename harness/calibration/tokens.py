"""From documents to the token sequences of a calibration pass."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.data.corpora import Document
from harness.errors import WinnowError

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
) -> list[TokenSequence]:
    """Token sequences of at most ``max_length`` tokens, no special tokens added, documents without a token left out.

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
    if not documents:
        raise WinnowError("the calibration corpus is empty: it has no documents")
    through_template = _template_is_used(documents, tokenizer, chat_template)
    encoded = _encode([_text(d, tokenizer, through_template) for d in documents], tokenizer)
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


def _text(document: Document, tokenizer: Any, chat_template: bool) -> str:
    if not (chat_template and document.messages):
        return document.text
    from jinja2 import TemplateError

    turns = [{"role": role, "content": content} for role, content in document.messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise WinnowError(
            f"the tokenizer's chat template refuses a document ({error}): set calibration.chat_template=false"
        ) from error


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
