"""The record store: one JSON file a finished cell, its samples in a parquet file beside it.

A JSON file that exists means a finished cell: it is the last thing that is put in place. Nothing else in the
folder means anything: locks and temporary files that a killed process leaves behind are ignored and swept up.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from harness.claims import claimed
from harness.contracts.record import RECORD_VERSION, Record, Sample
from harness.errors import WinnowError
from harness.files import sweep, write_files
from harness.records.identity import plain
from harness.records.old import upgraded

SAMPLE_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("item", pa.string()),
        ("domain", pa.string()),
        ("score", pa.float64()),
        ("weight", pa.float64()),
        ("output", pa.string()),
        ("detail", pa.string()),
        ("prompt", pa.string()),
    ]
)


_SCHEMA = TypeAdapter(Record)
_OF_CELL: dict[str, tuple[type, ...]] = {"id": (str,), "method": (str,), "ratio": (int, float), "seed": (int,)}


class RecordStore:
    """The records of a sweep in ``folder/records`` or, with ``kind="baseline"``, in ``folder/baseline``.

    Processes that share the folder share the store: ``claim`` makes them take turns at the same cell.
    """

    def __init__(self, folder: str | Path, kind: str = "records") -> None:
        self.folder = Path(folder) / kind

    def path(self, cell: str) -> Path:
        return self.folder / f"{cell}.json"

    def samples_path(self, cell: str) -> Path:
        return self.folder / f"{cell}.parquet"

    def ids(self) -> list[str]:
        """The finished cells, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json") if not path.name.startswith("."))

    def exists(self, cell: str) -> bool:
        return self.path(cell).is_file()

    def read(self, cell: str) -> Record:
        """Raises WinnowError, which names the file, where it is missing, damaged or from a newer version."""
        path = self.path(cell)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise TypeError("it holds no JSON object")
            if data["version"] > RECORD_VERSION:
                raise WinnowError(f"the record {path} was written by a newer version of winnow: update winnow")
            record = Record.from_json(now := upgraded(data))
            _check(record, now)
            return record
        except OSError as error:
            raise WinnowError(f"cannot read the record {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {_first_fault(error)}"
            raise WinnowError(f"the record {path} is damaged ({reason}): delete it and run its cell again") from error

    def read_table(
        self, cell: str, columns: Sequence[str] | None = None, record: Record | None = None
    ) -> pa.Table | None:
        """The samples of a cell as an Arrow table, or None where its parquet file is not kept.

        ``record`` is the cell's, where it was read before. Raises WinnowError where the file is damaged, or is not the
        one that its record was written with.
        """
        path = self.samples_path(cell)
        if not (path.exists() or path.is_symlink()):
            return None
        damaged = _damaged(path)
        try:
            content = path.read_bytes()
            expected = self._samples_sha256(cell) if record is None else record.samples_sha256
            if expected and hashlib.sha256(content).hexdigest() != expected:
                raise WinnowError(f"{damaged} (it is not the file that its record was written with)")
            file = pq.ParquetFile(pa.BufferReader(content))
            schema = file.schema_arrow
            # Where a hash has vouched for the file, columns that nobody asks for need not be read.
            table = file.read(columns and [name for name in columns if name in schema.names] if expected else None)
        except (OSError, pa.ArrowException) as error:
            raise WinnowError(damaged) from error
        for known in SAMPLE_SCHEMA:
            # Prompts were not kept at first.
            if known.name not in schema.names and known.name != "prompt":
                raise WinnowError(f"{damaged} (they have no column {known.name})")
            if known.name in schema.names and not _alike(schema.field(known.name).type, known.type):
                raise WinnowError(f"{damaged} (the column {known.name} is not of {known.type})")
        return table if columns is None else table.select(list(columns))

    def _samples_sha256(self, cell: str) -> str:
        """What the record says of its samples' file; nothing where it has none, or is from before that was kept."""
        return self.read(cell).samples_sha256 if self.exists(cell) else ""

    def read_samples(self, cell: str) -> list[Sample] | None:
        table = self.read_table(cell)
        if table is None:
            return None
        try:
            return [Sample(**{**row, "detail": json.loads(row["detail"])}) for row in table.to_pylist()]
        except (ValueError, TypeError) as error:  # a detail that is no JSON, a column too many
            raise WinnowError(_damaged(self.samples_path(cell))) from error

    def write(self, record: Record, samples: Sequence[Sample]) -> Path:
        """Puts the samples, then the record in place, each whole or not at all; returns the record's path.

        Raises WinnowError where the disk is full or the folder cannot be written; nothing new is left behind
        then.
        """
        cell = record.cell["id"]
        table = _to_parquet(samples)
        told = replace(record, samples_sha256=hashlib.sha256(table).hexdigest())
        text = json.dumps(told.to_json(), indent=1, default=plain)
        write_files({self.samples_path(cell): table, self.path(cell): text.encode()})
        return self.path(cell)

    @contextmanager
    def claim(self, cell: str) -> Iterator[bool]:
        """Holds the cell against other processes; gives False where it is finished already, True where it is
        ours.

        Waits for a process that holds it, on whatever machine, so after a wait the usual answer is False. The claim
        goes with a process that dies (``harness.claims``).
        """
        with claimed(self.folder / ".claims" / f"{cell}.claim", cell):
            sweep(self.folder, f".{cell}.*.tmp")
            yield not self.exists(cell)


def _damaged(samples: Path) -> str:
    return f"the samples {samples} are damaged: delete the file, or run its cell again"


def _check(record: Record, data: Mapping[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError where a value is not of the type that everybody reads it as; ``data`` is
    what the record was made from."""
    _SCHEMA.validate_json(json.dumps(data), strict=True)  # as JSON a text is not taken for a number
    for name, kinds in _OF_CELL.items():
        if not isinstance(record.cell[name], kinds):
            raise TypeError(f"cell.{name} is {record.cell[name]!r}")
    for name, value in record.sizes.items():
        if name.endswith(("bytes", "parameters")) and not isinstance(value, int | float | None):
            raise TypeError(f"sizes.{name} is {value!r}")


def _alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether both are texts, or both numbers."""
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return pa.types.is_floating(found) or pa.types.is_integer(found)


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return str(error)


def _to_parquet(samples: Sequence[Sample]) -> bytes:
    columns: dict[str, list[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in SAMPLE_SCHEMA.names if name != "detail"
    }
    columns["detail"] = [json.dumps(sample.detail, default=plain) for sample in samples]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SAMPLE_SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
