"""The record store: one JSON file a finished cell, its samples in a parquet file beside it.

A JSON file that exists means a finished cell: it is the last thing that is put in place. Nothing else in the
folder means anything: locks and temporary files that a killed process leaves behind are ignored and swept up.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from harness.contracts.record import RECORD_VERSION, STAGES, Record, Sample
from harness.errors import WinnowError
from harness.files import _write_error, write_files

log = logging.getLogger(__name__)

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
_SLUG_LENGTH = 48


def cell_id(cell: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """A readable name and 8 hex digits of a hash, safe as a file name:
    ``reference__reap__0.25__code__s0-1a2b3c4d``.

    ``cell`` needs model, method, ratio, calibration and seed. ``identity`` is everything else that changes
    the result: the parts of the configuration that matter (not the output folder, tracking or launcher) and,
    where known, fingerprints. Equal numbers hash alike however they were typed (``ratio=0`` and
    ``ratio=0.0``).
    """
    words = [
        cell["model"],
        cell["method"],
        f"{float(cell['ratio']):g}",
        cell["calibration"],
        f"s{cell['seed']}",
        *(cell[stage] for stage in STAGES if stage in cell),
    ]
    slug = "__".join(re.sub(r"[^A-Za-z0-9._]+", "-", str(word)).strip("-.")[:_SLUG_LENGTH] for word in words)
    content = {"cell": {key: value for key, value in cell.items() if key != "id"}, "identity": identity}
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"))
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
            if data["version"] > RECORD_VERSION:
                raise WinnowError(f"the record {path} was written by a newer version of winnow: update winnow")
            return Record.from_json(data)
        except OSError as error:
            raise WinnowError(f"cannot read the record {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise WinnowError(f"the record {path} is damaged ({reason}): delete it and run its cell again") from error

    def read_table(self, cell: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The samples of a cell as an Arrow table, or None where its parquet file is not kept."""
        path = self.samples_path(cell)
        if not path.is_file():
            return None
        try:
            return pq.read_table(path, columns=None if columns is None else list(columns))
        except (OSError, pa.ArrowException) as error:
            raise WinnowError(f"the samples {path} are damaged: delete the file, or run its cell again") from error

    def read_samples(self, cell: str) -> list[Sample] | None:
        table = self.read_table(cell)
        if table is None:
            return None
        return [Sample(**{**row, "detail": json.loads(row["detail"])}) for row in table.to_pylist()]

    def write(self, record: Record, samples: Sequence[Sample]) -> Path:
        """Puts the samples, then the record in place, each whole or not at all; returns the record's path.

        Raises WinnowError where the disk is full or the folder cannot be written; nothing new is left behind
        then.
        """
        cell = record.cell["id"]
        text = json.dumps(record.to_json(), indent=1, default=_plain)
        write_files({self.samples_path(cell): _to_parquet(samples), self.path(cell): text.encode()})
        return self.path(cell)

    @contextmanager
    def claim(self, cell: str) -> Iterator[bool]:
        """Holds the cell against other processes; gives False where it is finished already, True where it is
        ours.

        Waits for a process that holds it, so after a wait the usual answer is False. The lock is the
        kernel's: it goes with a process that dies.
        """
        lock = FileLock(self.folder / ".locks" / f"{cell}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("another process is at work on %s: waiting for it", cell)
                lock.acquire()
        except OSError as error:
            raise _write_error(self.folder, error) from error
        try:
            for left_behind in self.folder.glob(f".{cell}.*.tmp"):
                left_behind.unlink(missing_ok=True)
            yield not self.exists(cell)
        finally:
            lock.release()


def _to_parquet(samples: Sequence[Sample]) -> bytes:
    columns: dict[str, list[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in SAMPLE_SCHEMA.names if name != "detail"
    }
    columns["detail"] = [json.dumps(sample.detail, default=_plain) for sample in samples]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SAMPLE_SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _plain(value: Any) -> Any:
    """What JSON does not know: arrays and scalars of numpy, and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _canonical(_plain(value))
