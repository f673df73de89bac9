"""A cell with everything that is tracked, and what an offline run of W&B left on disk, read back without W&B's own
reader, which is gone from its package.
"""

import json
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.record import Record, Sample, Score
from harness.records.store import RecordStore
from tests.kinds import with_kinds

# Four experts of eight channels: layer 1 removes expert 1 and cuts expert 2, layer 3 merges experts 0, 1 and 3.
PLAN = {
    "layers": [
        {
            "layer": 1,
            "experts": [
                {"sources": [{"expert": 0, "weight": 1.0}], "channels": None},
                {"sources": [{"expert": 2, "weight": 1.0}], "channels": [0, 1, 5]},
                {"sources": [{"expert": 3, "weight": 1.0}], "channels": None},
            ],
            "route": [0, None, 1, 2],
        },
        {
            "layer": 3,
            "experts": [
                {"sources": [{"expert": e, "weight": 1 / 3} for e in (0, 1, 3)], "channels": None},
                {"sources": [{"expert": 2, "weight": 1.0}], "channels": None},
            ],
            "route": [0, 0, 1, 0],
        },
    ]
}
SALIENCY = {"method": "reap", "layers": {"1": [0.5, 0.1, 2.0, 1.5], "3": [0.25, 0.25, 1.0, 0.75]}}
STRETCHES = ("1-1", "2-2", "3-4")


def make_record(**cell: Any) -> Record:
    drift = [
        Score("drift", metric, 0.1 * (place + 1), 9 - place, 0.05, 0.5, f"position {stretch}", higher_is_better=False)
        for metric in ("js", "free_js", "tv")
        for place, stretch in enumerate(STRETCHES)
    ]
    running = [Score("drift", "running_cross_perplexity", 1.0 + n, 9, 1.0, 4.0, f"position 1-{n}") for n in (1, 2, 4)]
    described = {"model": "m", "method": "reap", "ratio": 0.25, "calibration": "code", "seed": 0}
    return Record(
        cell={"id": "m__reap__0.25__code__s0-0011aabb", **described, "suite": "s", "backend": "hf", "baseline": "base"}
        | cell,
        config={"method": {"name": "reap"}, "ratio": 0.25},
        versions={"winnow": "0"},
        fingerprints={"model": "abc"},
        scores=with_kinds(
            [
                Score("code", "pass@1", 0.75, 4, 0.3, 0.95),
                Score("math", "exact_match", 0.25, 4, 0.05, 0.7),
                Score("multiple_choice", "acc", 0.5, 2, 0.1, 0.9),
                Score("multiple_choice", "acc", 0.5, 2, 0.1, 0.9, part="math"),
                Score("diversity", "ngram_diversity_3", 0.8, 4, 0.7, 0.9),
                Score("drift", "js", 0.2, 9, 0.1, 0.3, higher_is_better=False),
                *drift,
                *running,
            ]
        ),
        sizes={"layout": "compact", "weights_bytes": 1000, "expanded_weights_bytes": None},
        timings={"evaluation": 2.5},
        plan={
            "1": {"experts": 3, "rows": 3, "group_sizes": [], "widths": [8, 3, 8]},
            "3": {"experts": 2, "rows": 4, "group_sizes": [3]},
        },
        expert_usage={"code": {"3": [5, 6, 7, 8], "1": [1, 2, 3, 4]}},
    )


def make_samples(word: str) -> list[Sample]:
    return [
        Sample("code", f"c{i}", float(i > 0), output=f"{word} {i}", detail={"i": i}, prompt=f"write {i}")
        for i in range(4)
    ]


def write_tracked_sweep(root: Path) -> tuple[Record, list[Sample], Path]:
    """A cell with all its files and its baseline in ``root``: record, samples, and the folder of the cell's files."""
    record, samples = make_record(), make_samples("compressed")
    baseline = make_record(id="base", method="none", ratio=0.0, calibration="none")
    RecordStore(root, "baseline").write(replace(baseline, plan={}, expert_usage={}), make_samples("whole")[1:])
    RecordStore(root).write(record, samples)
    folder = root / "cells" / record.cell["id"]
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "saliency.json").write_text(json.dumps(SALIENCY))
    return record, samples, folder


def offline_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key, no settings of the user's, and nothing written outside ``tmp_path``."""
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name.lower()))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return tmp_path


class OfflineRun:
    """The finished run in ``folder``, such as ``wandb/offline-run-20260101_000000-abc``.

    ``run`` is what wandb.init was given, ``config`` and ``summary`` what the run page shows, ``history`` one dict a
    step; ``table`` opens a logged table.
    """

    def __init__(self, folder: Path) -> None:
        self.files = folder / "files"
        (path,) = folder.glob("*.wandb")
        records = _finished_log(path)
        of_kind: dict[str, list[Any]] = {}
        for record in records:
            kind = record.WhichOneof("record_type")
            of_kind.setdefault(kind, []).append(getattr(record, kind))
        self.run = of_kind["run"][0]
        self.metrics = of_kind.get("metric", [])
        self.config = _values(self.run.config.update)
        self.summary: dict[str, Any] = {}
        for update in of_kind.get("summary", []):
            _values(update.update, self.summary)
        self.history = [_values(step.item) for step in of_kind.get("history", [])]

    def table(self, name: str) -> dict[str, Any]:
        (path,) = (self.files / "media" / "table").glob(f"{name}_*.table.json")
        return json.loads(path.read_text())

    def logged(self, kind: str) -> dict[str, list[dict[str, Any]]]:
        """name -> what was logged of a kind (``_type``), such as ``histogram``, step by step."""
        found: dict[str, list[dict[str, Any]]] = {}
        for step in self.history:
            for name, value in step.items():
                if isinstance(value, dict) and value.get("_type") == kind:
                    found.setdefault(name, []).append(value | {"_step": step["_step"]})
        return found


def offline_runs(folder: Path) -> dict[str, OfflineRun]:
    """name -> run, of all runs under ``folder``."""
    runs = [OfflineRun(path) for path in folder.glob("wandb/offline-run-*")]
    return {one.run.display_name: one for one in runs}


def _values(items: Any, into: dict[str, Any] | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {} if into is None else into
    for item in items:
        *parents, name = item.nested_key or [item.key]
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(item.value_json)
    return values


def _finished_log(path: Path) -> list[Any]:
    """The records of a run; W&B's own process may close the file a moment after the run has finished."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = read_log(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} was not finished within a minute")


def read_log(path: Path) -> list[Any]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, partial, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:  # no room for another piece's header: the block is filled up
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        piece = data[place + 7 : place + 7 + length]
        if len(piece) < length:  # still being written
            break
        partial += piece
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records
