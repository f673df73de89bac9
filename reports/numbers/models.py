"""What models are called where several have one name, as those in folders of the same name do."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from harness.contracts.record import Record


def telling_names(records: Sequence[Record]) -> list[str]:
    """The model of each record by its name; where different models share one, with as much of the path as tells them
    apart: ``checkpoint (A/checkpoint)``. Where paths do not, the beginning of the fingerprint does.
    """
    alike: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        alike[_name(record)].setdefault(_fingerprint(record), record)
    return [_told(record, list(alike[_name(record)].values())) for record in records]


def _told(record: Record, namesakes: Sequence[Record]) -> str:
    if len(namesakes) < 2:
        return _name(record)
    own = next(one for one in namesakes if _fingerprint(one) == _fingerprint(record))
    paths = {_fingerprint(one): PurePath(_path(one)).parts for one in namesakes}
    for length in range(1, 1 + max(map(len, paths.values()))):
        tails = [parts[-length:] for parts in paths.values()]
        if all(tails) and len(set(tails)) == len(tails):
            return f"{_name(record)} ({'/'.join(paths[_fingerprint(own)][-length:])})"
    return f"{_name(record)} ({_fingerprint(record).rpartition(':')[2][:8]})"


def _name(record: Record) -> str:
    return str(record.cell.get("model") or "")


def _fingerprint(record: Record) -> str:
    return record.fingerprints.get("model", "")


def _path(record: Record) -> str:
    node: Any = record.config.get("model")
    return str(node.get("path") or "") if isinstance(node, dict) else ""
