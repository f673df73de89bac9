"""Cells by what they are: which row of a panel one is, and the command that runs those that are missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import conf
from harness.contracts.record import RECOVERY, STAGES, Record
from reports.numbers.load import BASELINE_METHOD, NO_CORPUS, Panel, Row


@dataclass(frozen=True)
class Cell:
    """A cell as a person would ask for it. Settings that are not given are the method's defaults.

    ``settings`` are (key, value) pairs as on the command line, such as ("method.scope", "global") or
    ("quantize", "int4"). The uncompressed model is the method "none" at ratio 0.
    """

    method: str
    ratio: float = 0.5
    calibration: str = "mixed"
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.settings)
        return f"method={self.method} ratio={self.ratio:g} calibration={self.calibration}{extra}"


def matches(cell: Cell, row: Row) -> bool:
    """Whether the row is that cell. A method that uses no calibration is the same on every corpus."""
    record = row.records[0]
    return (
        record.cell["method"] == cell.method
        and math.isclose(row.ratio, cell.ratio)
        and row.calibration in (cell.calibration, NO_CORPUS)
        and _settings_match(dict(cell.settings), record)
    )


# Stages that a record may tell of, by a word of its description or its configuration, and the words for none of it.
_STAGES = tuple(dict.fromkeys((*STAGES, "refit", "router", "allocation")))
_NOTHING = ("None", "", "none", "one_shot", "as_is", "uniform")
# What a method's configuration may lack that was made before there was such a setting: it was made with this.
_BEFORE = {"constants": False}


def _settings_match(wanted: Mapping[str, Any], record: Record) -> bool:
    for name in _STAGES:
        found = _variant(record, name)
        asked = str(wanted.get(name, "none"))
        # A record says more than was asked for: "int4-g8-sym" is an "int4"; "routed-refit-alpha0.1" is another refit.
        alike = found == f"{asked}-{name}" if name in RECOVERY else asked != "none" and found.startswith(asked)
        if found != asked and not alike:
            return False
    found, defaults = record.config.get("method", {}), _BEFORE | _method_defaults(record.cell["method"])
    asked_of_method = {key.removeprefix("method."): value for key, value in wanted.items() if key.startswith("method.")}
    # A record from before a setting existed was made with its default.
    return all(found.get(key, defaults.get(key)) == value for key, value in (defaults | asked_of_method).items())


def _variant(record: Record, name: str) -> str:
    value = record.cell.get(name, record.config.get(name))
    if isinstance(value, Mapping):
        value = value.get("name")
    return "none" if str(value) in _NOTHING else str(value)


@cache
def _defaults(group: str, name: str) -> Mapping[str, Any]:
    """The plain values of a configuration file; empty where it does not exist (a method of the user's own)."""
    path = Path(conf.__file__).parent / group / f"{name}.yaml"
    if not path.is_file():
        return {}
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _method_defaults(name: str) -> dict[str, Any]:
    known = _defaults("method", name)
    return {
        key: value
        for key, value in known.items()
        if key not in ("_target_", "name", "defaults") and not (isinstance(value, str) and "${" in value)
    }


def commands(cells: Sequence[Cell], panel: Panel, suite: str, folder: Path, also: Sequence[str] = ()) -> list[str]:
    """Commands that run the cells for the model of a panel, cells that differ in their method alone together.

    The uncompressed model has a command where there is nothing else to run: it is evaluated with any cell of its suite.
    """
    together: dict[Cell, list[str]] = {}
    for cell in cells:
        if cell.method == BASELINE_METHOD and not cell.settings:
            continue
        together.setdefault(Cell("", cell.ratio, cell.calibration, cell.settings), []).append(cell.method)
    if cells and not together:
        together[Cell("", 0.0, cells[0].calibration)] = [BASELINE_METHOD]
    return [
        " ".join([*_command(methods, cell, panel, suite or panel.suite), *also, f"output_dir={folder}"])
        for cell, methods in together.items()
    ]


def _command(methods: Sequence[str], cell: Cell, panel: Panel, suite: str) -> list[str]:
    names = list(dict.fromkeys(methods))
    words = ["winnow", *(["-m"] if len(names) > 1 else [])]
    config = next((record.config for row in panel.all_rows() for record in row.records), {})
    path = config.get("model", {}).get("path")
    # What has no configuration of its own is named after its folder.
    local = path and _defaults("model", panel.model).get("path", "???") == "???"
    words += ["model=local", f"model.path={path}"] if local else [f"model={panel.model}"]
    words += [f"method={','.join(names)}", f"ratio={cell.ratio:g}", f"calibration={cell.calibration}"]
    words += [f"{key}={value}" for key, value in cell.settings]
    words.append(f"suite={suite}")
    items = config.get("suite", {}).get("items")
    if items is not None and items != _defaults("suite", suite).get("items", items):
        words.append(f"suite.items={items}")
    return [*words, f"backend={panel.backend}"]
