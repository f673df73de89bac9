"""Items that share something: a template, a composition of steps, a value of a field. Read off their prompts.

Items made from one template are no independent samples. Two prompts have one template where they differ in numbers,
quoted words and names alone (words with a capital, but for the first of a sentence). A prompt of three or more lines
``Field: value`` has none, but shares each of its values with others: each field is a grouping of its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.numbers.load import Panel

FEWEST = 10
_LOOKED_AT = 3  # cells: all of a sweep keep their prompts, or none
Groupings = Mapping[str, tuple[str, ...]]  # item -> what it shares with others: a label in each grouping
_VARIABLE = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|\d+(?:\.\d+)?|(?<![.?!:\n] )(?<!^)\b[A-Z][a-z]+\b")
_FIELD = re.compile(r"^([A-Z][a-z]+): (\S.*)$", re.MULTILINE)


def labels_of(prompt: str) -> tuple[str, ...]:
    """Its template, or ``Field: value`` of each of its fields."""
    fields = _FIELD.findall(prompt)
    if len(fields) >= 3:
        return tuple(f"{name}: {value}" for name, value in fields)
    body = prompt.replace('"""', "\n")  # a docstring is no quoted word
    return (_VARIABLE.sub("#", body),)


def read_groupings(folder: Path, panels: Iterable[Panel]) -> Groupings:
    """From the first cells of each panel, if their samples hold prompts; empty where none do."""
    found: dict[str, tuple[str, ...]] = {}
    for panel in panels:
        for record in panel.records()[:_LOOKED_AT]:
            prompts = _prompts(folder, record.cell["id"])
            if prompts:
                found |= {item: labels_of(prompt) for item, prompt in prompts if item not in found}
                break
    return found


def _prompts(folder: Path, cell: str) -> list[tuple[str, str]]:
    for kind in ("records", "baseline"):
        try:
            table = RecordStore(folder, kind).read_table(cell)
        except WinnowError:  # damaged, which is told elsewhere
            continue
        if table is not None and "prompt" in table.column_names:
            items, prompts = (table.column(name).to_pylist() for name in ("item", "prompt"))
            return [(item, prompt) for item, prompt in zip(items, prompts, strict=True) if prompt]
    return []


def clusters(items: Sequence[str], groupings: Groupings) -> list[np.ndarray]:
    """Of each grouping in which some items share a label: (n,) the number of each item's cluster.

    An item without a label is a cluster of its own. Fewer than ten clusters say too little of how clusters vary.
    """
    labels = [groupings.get(item, ()) for item in items]
    found = []
    for place in range(max(map(len, labels), default=0)):
        own = [of[place] if place < len(of) else f"item {item}" for item, of in zip(items, labels, strict=True)]
        names, numbers = np.unique(np.array(own), return_inverse=True)
        if FEWEST <= len(names) < len(own):
            found.append(numbers)
    return found


def clustered_variance(apart: np.ndarray, numbers: np.ndarray) -> tuple[float, int]:
    """Squared error of the mean of n items in G clusters, and its degrees of freedom, G - 1.

    ``apart`` (n,) are the items less their mean; G / (G - 1) times the sum of the squares of the clusters' sums, over
    n squared (Liang and Zeger, Biometrika 73, 1986).
    """
    sums = np.bincount(numbers, weights=apart)
    count = len(sums)
    return float(count / (count - 1) * np.sum(sums**2)) / len(apart) ** 2, count - 1
