"""From the files that people have to documents: rows of JSON Lines, JSON, text and parquet, in the usual shapes.

A row is read as the first of these that it has: a text column; ``messages`` ({role, content}, content may be parts or
absent beside tool calls); ``conversations`` ({from, value}, as ShareGPT writes them); a question and an answer column
(``PAIRS``), each a text or a list of messages.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import WinnowError

# What the user says, and what the assistant answers.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("query", "response"),
)  # fmt: skip
_ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_FITS = (
    "a row needs a text column, messages, conversations, or one of "
    + ", ".join("/".join(pair) for pair in PAIRS)
    + "; calibration.text_column, calibration.template or calibration.columns say what yours are called"
)
_COMPRESSED = (".gz", ".zst")

Row = Mapping[str, Any]
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """One text; ``source`` labels it in the usage counts, ``messages`` are its (role, content) turns, ``where`` says
    which row of which file it is."""

    text: str
    source: str = ""
    messages: Turns = ()
    where: str = field(default="", compare=False)


# --- files ------------------------------------------------------------------------------------------------------------


def is_readable(path: Path) -> bool:
    """Whether the name is one of a kind that ``rows_of`` reads."""
    return _kind(path) in _READERS


def rows_of(file: Path, text_column: str = "text") -> Iterator[tuple[str, Row]]:
    """(where, row) of every row of a file; a ``.txt`` file is one. Compressed files (.gz, .zst) are read through.

    Raises WinnowError, with file and row, for a file that cannot be read as what its name says.
    """
    reader = _READERS.get(_kind(file))
    if reader is None:
        raise WinnowError(f"cannot read {file} as a corpus: expected a file named {readable_names()}")
    try:
        yield from reader(file, text_column)
    except UnicodeDecodeError as error:
        raise WinnowError(f"{file} is not UTF-8 text (at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise WinnowError(f"cannot read the corpus {file}: {error.strerror or error}") from error


def readable_names() -> str:
    return f"{', '.join(_READERS)} (or these with {' or '.join(_COMPRESSED)})"


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _opened(file: Path) -> io.TextIOWrapper:
    """Its text, without the mark that some programs put before UTF-8."""
    if file.suffix not in _COMPRESSED:
        return file.open(encoding="utf-8-sig")
    import pyarrow

    compression = {".gz": "gzip", ".zst": "zstd"}[file.suffix]
    return io.TextIOWrapper(pyarrow.input_stream(str(file), compression=compression), encoding="utf-8-sig")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise WinnowError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise WinnowError(f"{where} is nested too deeply to be read: flatten it, or leave it out") from error


def _read_jsonl(file: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _object(_json(line, where), where, text_column)


def _read_json(file: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    """A list of rows; where the file begins with no list, a row a line."""
    with _opened(file) as opened:
        text = opened.read()
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file, text_column)
        return
    for number, row in enumerate(_json(text, str(file)), start=1):
        where = f"{file}, row {number}"
        yield where, _object(row, where, text_column)


def _object(row: Any, where: str, text_column: str) -> Row:
    if not isinstance(row, dict):
        raise WinnowError(f"{where} is not a JSON object with a '{text_column}'")
    return row


def _read_text(file: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    with _opened(file) as opened:
        yield str(file), {text_column: opened.read()}


def _read_parquet(file: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise WinnowError(f"{file} is not a valid parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{file}, row {number}", row


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


# --- rows -------------------------------------------------------------------------------------------------------------


def shaped(
    row: Row,
    where: str,
    template: str | None = None,
    chat: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Row:
    """The row with what a corpus' settings make of it: ``columns`` gives columns the names that are known here (name ->
    column), ``template`` is a ``str.format`` over columns that becomes the text, ``chat`` maps roles to columns.

    Raises WinnowError where a column is missing.
    """
    found = dict(row)
    setting = "columns"
    try:
        found |= {name: row[column] for name, column in (columns or {}).items()}
        setting = "template"
        if template is not None:
            found["text"] = template.format(**row)
        setting = "chat"
        if chat:
            found["messages"] = [{"role": role, "content": row[column]} for role, column in chat.items()]
    except (KeyError, IndexError, ValueError) as error:
        raise WinnowError(f"{where}: {setting} needs column {error}; columns: {', '.join(row)}") from error
    return found


def document_of(row: Row, text_column: str, source: str, where: str) -> Document:
    """Raises WinnowError where the row has nothing to read, and says what would fit."""
    messages = _messages(row, where)
    text = row.get(text_column)
    if text is None and messages and text_column == "text":  # a column that was asked for by name has to be there
        text = "\n\n".join(content for _, content in messages)
    if not isinstance(text, str):
        null = " (it is null)" if text_column in row and text is None else ""
        columns = ", ".join(row) or "none"
        raise WinnowError(f"{where}: no text in column '{text_column}'{null}; columns: {columns}; {_FITS}")
    for words in (text, *(content for _, content in messages)):
        try:
            words.encode()
        except UnicodeEncodeError as error:
            half = words[error.start].encode("ascii", "backslashreplace").decode()
            raise WinnowError(f"{where} holds half a character ({half}), which no tokenizer reads: mend it") from error
    return Document(text, source, messages, where)


def _messages(row: Row, where: str) -> Turns:
    for column in ("messages", "conversations"):
        if row.get(column):
            return _turns(row[column], column, where)
    for asked, answered in PAIRS:
        if row.get(asked) is not None and row.get(answered) is not None:
            said = _part(row[asked], "user", asked, where)
            if row.get("input") and asked == "instruction":
                (role, text), *rest = said
                said = ((role, f"{text}\n\n{row['input']}"), *rest)
            return said + _part(row[answered], "assistant", answered, where)
    return ()


def _part(value: Any, role: str, column: str, where: str) -> Turns:
    return ((role, value),) if isinstance(value, str) else _turns(value, column, where)


def _turns(value: Any, column: str, where: str) -> Turns:
    try:
        turns: Sequence[Mapping[str, Any]] = json.loads(value) if isinstance(value, str) else value
        return tuple((_role(turn), _content(turn)) for turn in turns)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        form = "{from, value}" if column == "conversations" else "{role, content}"
        raise WinnowError(f"{where}: '{column}' is not a list of {form}") from error


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn["role"] if "role" in turn else turn["from"])
    return _ROLES.get(role, role)


def _content(turn: Mapping[str, Any]) -> str:
    """What a turn says: its text (or the text parts of it), then its tool calls as JSON, one a line."""
    content = turn.get("content", turn.get("value")) or ""
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([content, *calls] if content else calls)
