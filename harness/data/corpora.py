"""Calibration corpora: loaders that Hydra instantiates, and the way from their documents to tokens.

A loader is deterministic in its ``seed`` and gives at most ``num_sequences`` documents. To add a corpus, add a file to
``conf/calibration`` whose ``corpus._target_`` is one of these loaders or any function like them.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.sets import staged_rows
from harness.errors import WinnowError

log = logging.getLogger(__name__)
_ENCODE_AT_ONCE = 1000


@dataclass(frozen=True)
class Document:
    """One text; ``source`` labels it in the usage counts, ``messages`` are its (role, content) turns."""

    text: str
    source: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TokenSequence:
    """What the model sees at once: one or more whole documents (or pieces of them), one after the other.

    ``input_ids`` is (L,) int64; ``lengths`` holds the tokens of each document in it and adds up to L;
    ``sources`` holds one label for each of them. Attention never crosses from one document into the next.
    """

    input_ids: np.ndarray
    lengths: tuple[int, ...]
    sources: tuple[str, ...]


# --- loaders ------------------------------------------------------------------------------------------------


def load_documents(corpus: Any) -> list[Document]:
    """The documents of a ``corpus`` config node. Raises WinnowError, as its loader does."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    try:
        return instantiate(corpus)
    except InstantiationException as error:
        if isinstance(error.__cause__, WinnowError):  # Hydra wraps what its targets raise
            raise error.__cause__ from None
        raise
    except (InterpolationToMissingValueError, MissingMandatoryValue) as error:
        option = str(error.full_key).rpartition(".")[2]
        raise WinnowError(f"the calibration corpus lacks a value: set calibration.{option}") from error


def local_files(
    path: str,
    num_sequences: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    source: str = "local",
    source_column: str | None = None,
) -> list[Document]:
    """Documents of a JSONL, text or parquet file, or of every such file in a folder (in the order of their paths).

    A ``.txt`` file is one document; a row of a JSONL or parquet file is one, its text in ``text_column`` (and its chat
    turns in ``messages``, where there are any). With ``num_sequences`` a random sample of that many, in file order;
    without, all. Raises WinnowError where nothing can be read.
    """
    _check_count(num_sequences)
    root = Path(path)
    if not root.exists():
        raise WinnowError(f"calibration corpus {path} does not exist")
    files = sorted(p for p in root.rglob("*") if p.suffix in _READERS) if root.is_dir() else [root]
    if not files:
        raise WinnowError(f"no {', '.join(_READERS)} file in {path}")
    documents: list[Document] = []
    for file in files:
        if file.suffix not in _READERS:
            raise WinnowError(f"cannot read {file} as a corpus: expected a file named {', '.join(_READERS)}")
        try:
            for where, row in _READERS[file.suffix](file, text_column):
                label = str(row.get(source_column, source)) if source_column else source
                documents.append(_document_of_row(row, text_column, label, where))
        except (OSError, UnicodeDecodeError) as error:
            raise WinnowError(f"cannot read the corpus {file}: {error}") from error
    return _sample(documents, num_sequences, seed)


def hub_dataset(
    path: str,
    split: str,
    num_sequences: int | None = None,
    seed: int = 0,
    name: str | None = None,
    text_column: str | None = None,
    template: str | None = None,
    chat: Mapping[str, str] | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 10_000,
    source: str = "",
    root: str | None = None,
    staged_as: str = "",
) -> list[Document]:
    """A random sample of a data set that ``datasets`` can load: a hub id, or a folder in the same format.

    With a ``root`` (and a name in it, ``staged_as``) only what ``winnow-data stage`` put there is read: see
    ``staged_corpus``. The text is ``template``, a ``str.format`` over the columns, or the column ``text_column``
    ("text" unless told), or else the contents of ``messages``. Chat turns, for tokenizers with a template, come from
    ``messages`` (a list, or JSON) or from ``chat``, which maps roles to columns (``{user: instruction, assistant:
    output}``). ``streaming`` reads no more than it needs and shuffles within ``shuffle_buffer`` rows, for data sets too
    large to download. Raises WinnowError where the data set or a column is missing.
    """
    _check_count(num_sequences)
    if text_column is not None and template is not None:
        raise WinnowError(f"corpus {path}: give text_column or template, not both")
    if root is not None and staged_as:
        return staged_corpus(staged_as, root, num_sequences, seed, source)
    import datasets  # here, as it takes seconds to import and most corpora are local

    try:
        rows = datasets.load_dataset(path, name, split=split, streaming=streaming)
        if streaming:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
            rows = rows if num_sequences is None else rows.take(num_sequences)
        else:
            rows = rows.shuffle(seed=seed)
            rows = rows if num_sequences is None else rows.select(range(min(num_sequences, len(rows))))
        documents = []
        for index, row in enumerate(rows):
            text = {"text": _format(template, row, path)} if template is not None else {}
            turns = {"messages": _turns(chat, row, path)} if chat else {}
            where = f"{path} ({split}), row {index}"
            documents.append(_document_of_row({**row, **text, **turns}, text_column or "text", source, where))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if staged_as:
            reason += f"; without a network: winnow-data stage --calibration {staged_as} --to DIR, then data.root=DIR"
        raise WinnowError(f"cannot load the data set {path} (split {split}): {reason}") from error
    return documents


def staged_corpus(
    name: str, root: str | None, num_sequences: int | None = None, seed: int = 0, source: str = ""
) -> list[Document]:
    """A random sample, in order, of the corpus ``name`` under the folder ``root`` that ``winnow-data stage`` filled.

    Raises WinnowError without a ``root``, and where the corpus is not in it.
    """
    _check_count(num_sequences)
    if root is None:
        stage = f"winnow-data stage --calibration {name} --to DIR"
        raise WinnowError(f"{name} is read from staged data: {stage}, then data.root=DIR")
    staged = staged_rows(name, root)
    if num_sequences is not None and num_sequences > len(staged):
        log.warning("corpus %s: %d documents wanted, %d are staged in %s", name, num_sequences, len(staged), root)
    documents = [_document_of_row(row, "text", source or name, f"{root}/{name}, {row['id']}") for row in staged]
    return _sample(documents, num_sequences, seed)


def mixture(parts: Sequence[str], seed: int = 0, root: str | None = None) -> list[Document]:
    """Documents of several corpora, from parts ``name:number``: ``[code:1024, writing:512]``.

    Each name is another config of the group ``calibration``, of which only the corpus is used (length, packing and the
    rest are the mixture's own); its documents keep their own source. ``root`` is their ``data.root``. Raises
    WinnowError for an unknown name.
    """
    if not parts:
        raise WinnowError("the mixture has no parts: give some, as calibration.parts=[code:1024,writing:512]")
    documents: list[Document] = []
    for part in parts:
        name, _, number = str(part).rpartition(":")
        if not name or not number.isdigit() or int(number) == 0:
            raise WinnowError(f"mixture part '{part}' is not NAME:NUMBER (as in code:1024)")
        documents.extend(load_documents(calibration_config(name, int(number), seed, root).corpus))
    return documents


def calibration_config(name: str, num_sequences: int | None, seed: int, root: str | None) -> Any:
    """The node of ``calibration/NAME.yaml`` on the search path of the running Hydra application."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict

    if not GlobalHydra.instance().is_initialized():
        raise WinnowError("a mixture names other calibration configs, so it needs Hydra to be running")
    loader = GlobalHydra.instance().config_loader()
    known = [option for option in loader.get_group_options("calibration") if not option.startswith("_")]
    if name not in known:
        raise WinnowError(f"unknown calibration corpus '{name}'; known: {', '.join(known)}")
    number = "null" if num_sequences is None else num_sequences
    config = compose(f"calibration/{name}", [f"calibration.num_sequences={number}", f"calibration.seed={seed}"])
    with open_dict(config):
        config.data = {"root": root}
    return config.calibration


def _read_jsonl(file: Path, text_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise WinnowError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise WinnowError(f"{file}, line {number} is not a JSON object with a '{text_column}'")
            yield f"{file}, line {number}", row


def _read_text(file: Path, text_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield str(file), {text_column: file.read_text(encoding="utf-8")}


def _read_parquet(file: Path, text_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise WinnowError(f"{file} is not a valid parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{file}, row {number}", row


_READERS = {".jsonl": _read_jsonl, ".txt": _read_text, ".parquet": _read_parquet}


def _document_of_row(row: Mapping[str, Any], text_column: str, source: str, where: str) -> Document:
    """Raises WinnowError where the row has neither text nor messages."""
    turns = row.get("messages") or ()
    try:
        turns = json.loads(turns) if isinstance(turns, str) else turns
        messages = tuple((str(turn["role"]), _content(turn)) for turn in turns)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise WinnowError(f"{where}: 'messages' is not a list of {{role, content}}") from error
    text = row.get(text_column)
    if text is None and messages:
        text = "\n\n".join(content for _, content in messages)
    if not isinstance(text, str):
        raise WinnowError(f"{where}: no text in column '{text_column}'; columns: {', '.join(row) or 'none'}")
    return Document(text, source, messages)


def _content(turn: Mapping[str, Any]) -> str:
    """What a turn says: its text (or the text parts of it), then its tool calls as JSON, one a line."""
    content = turn["content"] or ""
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([content, *calls] if content else calls)


def _format(template: str, row: Mapping[str, Any], path: str) -> str:
    try:
        return template.format(**row)
    except (KeyError, IndexError) as error:
        raise WinnowError(f"corpus {path}: template needs column {error}; columns: {', '.join(row)}") from error


def _turns(chat: Mapping[str, str], row: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    try:
        return [{"role": role, "content": row[column]} for role, column in chat.items()]
    except KeyError as error:
        raise WinnowError(f"corpus {path}: chat needs column {error}; columns: {', '.join(row)}") from error


def _check_count(num_sequences: int | None) -> None:
    if num_sequences is not None and num_sequences < 1:
        raise WinnowError(f"calibration.num_sequences must be at least 1 (or null: all), not {num_sequences}")


def _sample(documents: list[Document], count: int | None, seed: int) -> list[Document]:
    if count is None or count >= len(documents):
        return documents
    return [documents[i] for i in sorted(random.Random(seed).sample(range(len(documents)), count))]


# --- tokens -------------------------------------------------------------------------------------------------


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
