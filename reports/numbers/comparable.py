"""Which cells may be compared: those that were made from the same model, items and, where they name the same corpus,
the same calibration text. Others stand in the tables with a mark, and in no difference and no test.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from harness.contracts.record import Record


def differing(first: Record, second: Record, tasks: Iterable[str] | None = None) -> list[str]:
    """What the two were made from and differs, where both say it: ``tasks`` are those whose items count (None: all)."""
    one, other = first.fingerprints, second.fingerprints
    names = {"model": "model", "tokenizer": "tokenizer"}  # fingerprint -> what it is called
    shared = first.cell.get("calibration") == second.cell.get("calibration")
    names |= {"corpus": "calibration text"} if shared else {}
    items = {name for name in one if name.startswith("items/")}
    wanted = None if tasks is None else {f"items/{task}" for task in tasks}
    names |= {name: f"items of {name.partition('/')[2]}" for name in sorted(items) if wanted is None or name in wanted}
    return [said for name, said in names.items() if name in one and name in other and one[name] != other[name]]


def odd_ones(records: Sequence[Record], baseline: Record | None) -> dict[str, list[str]]:
    """Id -> what a record was made from that is not what the baseline was, nor most records (of its corpus)."""
    given = {} if baseline is None else baseline.fingerprints
    common = _usual(record.fingerprints for record in records) | given
    of_corpora: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for record in records:
        of_corpora[str(record.cell.get("calibration"))].append(record.fingerprints)
    corpora = {name: _usual(prints).get("corpus", "") for name, prints in of_corpora.items()}
    found: dict[str, list[str]] = {}
    for record in records:
        usual = common | {"corpus": corpora[str(record.cell.get("calibration"))]}
        if told := differing(record, replace(record, fingerprints=usual)):
            found[record.cell["id"]] = told
    return found


def _usual(prints: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Name -> what most hold under it; of equally many what comes first."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for one in prints:
        for name, value in one.items():
            counted[name][value] += 1
    return {name: min(values, key=lambda value: (-values[value], value)) for name, values in counted.items()}
