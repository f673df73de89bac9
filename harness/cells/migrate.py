"""Records of before, brought to today's form and ids in place: ``winnow-report migrate DIR``.

What a cell is has not changed, only what it is called: an id is computed anew from what the record says of its cell,
as a new run would compute it, and all that bears the old one (record, samples, plan, diagnostics) is renamed. The old
id stays in the record as ``was``. Fingerprints that a record lacks are computed where what it was made from is still
there: the tokenizer, if the model's weights are those of the record, and the items of its tasks, under the Python that
it names. Where they are not, a new run does not find the cell, and computes it. A migration that was stopped goes on
when it is started again; a second one finds nothing to do.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

import conf
from harness.cells.contents import digest
from harness.checkpoints.fingerprint import model_fingerprint, tokenizer_fingerprint
from harness.contracts.record import RECORD_VERSION, Record
from harness.contracts.task import Task
from harness.errors import WinnowError
from harness.files import write_files
from harness.progress import bar
from harness.records.identity import identified
from harness.records.store import RecordStore

FIRST = "1"  # the version of everything that was recorded before there were versions


def migrate(root: Path) -> tuple[int, int]:
    """Migrates the records in ``root``; returns how many were changed and how many there are.

    Raises WinnowError where there are no records, one is damaged, or two would become one.
    """
    stores = [RecordStore(root, kind) for kind in ("baseline", "records")]
    found = [(store, name) for store in stores for name in store.ids()]
    if not found:
        raise WinnowError(f"no records in {root}: give the output_dir of a run")
    changed = 0
    for store, name in bar("migrating records", len(found), found):
        if store.exists(name):  # else a migration that was stopped has left it twice, and its twin came first
            changed += _migrate(store, name, root)
    return changed, len(found)


def _migrate(store: RecordStore, name: str, root: Path) -> bool:
    record = renamed(store.read(name))
    new = record.cell["id"]
    if new == name and _version(store, name) == RECORD_VERSION:
        return False
    if new != name and store.exists(new) and name not in store.read(new).was:
        raise WinnowError(f"{store.path(name)} and {store.path(new)} are the same cell: delete one of them")
    # The old record goes last: until then everything can be done once more.
    _move(store.samples_path(name), store.samples_path(new))
    if not record.samples_sha256 and store.samples_path(new).is_file():
        record = replace(record, samples_sha256=hashlib.sha256(store.samples_path(new).read_bytes()).hexdigest())
    if store.folder.name == "records":
        _move(root / "cells" / name, root / "cells" / new)
        _move_diagnostics(RecordStore(root, "diagnostics"), name, new)
    write_files({store.path(new): json.dumps(record.to_json(), indent=1).encode()})
    if new != name:
        store.path(name).unlink()
    return True


def renamed(record: Record) -> Record:
    """The record under the id that a new run would give its cell, with the versions that it was made with."""
    record = replace(record, fingerprints=_completed(record))
    method_version, task_versions = record.method_version, record.task_versions
    uncompressed = "baseline" not in record.cell
    if not task_versions:
        task_versions = dict.fromkeys(record.config["suite"]["tasks"], FIRST)
    if not method_version and not uncompressed:
        method_version = _first_version(record.config["method"])
    cell, baseline = identified(
        record.cell, record.config, record.fingerprints, method_version, task_versions, record.versions
    )
    described = baseline if uncompressed else cell
    old, new = record.cell["id"], described["id"]
    return replace(
        record,
        cell={key: described.get(key, value) for key, value in record.cell.items()},
        method_version=method_version,
        task_versions=task_versions,
        was=record.was if old == new else [*record.was, old],
        version=RECORD_VERSION,
    )


def _completed(record: Record) -> dict[str, str]:
    """The record's fingerprints, and those that can be computed of what it was made from."""
    found, model = dict(record.fingerprints), Path(str(record.config["model"].get("path")))
    if "tokenizer" in found or not model.is_dir():
        return found
    same_python = record.versions.get("python") == platform.python_version()
    if _model(model) != found["model"] or not same_python:
        return found
    for name, node in record.config["suite"]["tasks"].items():
        with suppress(WinnowError, InstantiationException):
            where = _targets().get(node["_target_"].rpartition(".")[2], node["_target_"])
            task: Task = instantiate({**node, "_target_": where}, _convert_="all")
            if (content := task.items_content()) is not None:
                found[f"items/{name}"] = digest(content)
    return found | {"tokenizer": tokenizer_fingerprint(model)}


@lru_cache(maxsize=4)
def _model(folder: Path) -> str:
    return model_fingerprint(folder)


@lru_cache(maxsize=1)
def _targets() -> dict[str, str]:
    """Class -> where it now lies, of the tasks that the suites name: records hold where it lay."""
    files = Path(conf.__file__).parent.glob("suite/**/*.yaml")
    found = (target for file in files for target in re.findall(r"_target_: ([\w.]+)", file.read_text()))
    return {target.rpartition(".")[2]: target for target in found}


def _first_version(method: Mapping[str, Any]) -> str:
    """As ``methods.chain.Chain`` puts the versions of its stages together."""
    stages = [f"{method[stage]['name']} {FIRST}" for stage in ("first", "second") if stage in method]
    return f"{FIRST} ({', '.join(stages)})" if stages else FIRST


def _version(store: RecordStore, name: str) -> int:
    return int(json.loads(store.path(name).read_text(encoding="utf-8"))["version"])


def _move(old: Path, new: Path) -> None:
    if old != new and old.exists():
        old.rename(new)


def _move_diagnostics(store: RecordStore, old: str, new: str) -> None:
    if old != new and store.exists(old):
        data = json.loads(store.path(old).read_text(encoding="utf-8"))
        write_files({store.path(new): json.dumps(data | {"cell": new}, indent=1).encode()})
        store.path(old).unlink()
