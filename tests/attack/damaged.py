"""Folders of results of which one file is damaged. ``results`` asks for both reports of each: the file is named in one
line, and what is sound is reported.
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reports import cli

SOURCE = Path(__file__).resolve().parents[2] / "results" / "claims"
CELLS = ("reference__hc_smoe__0.5__mixed__s0-", "reference__reap__0.5__mixed__s0-")
PAGE = Path("report") / "page.html"
CLAIMS = Path("report") / "claims.json"

Damage = Callable[[Path], None]


def sound(folder: Path) -> Path:
    """Two cells of a sweep that is shown, with all that lies beside their records, and saliency made up."""
    kept = [min((SOURCE / "records").glob(f"{name}*.json")).stem for name in CELLS]
    baseline = json.loads((SOURCE / "records" / f"{kept[0]}.json").read_text())["cell"]["baseline"]
    for kind, names in (("records", kept), ("baseline", [baseline]), ("diagnostics", kept)):
        for name in names:
            for path in (SOURCE / kind).glob(f"{name}.*"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / kind / path.name)
    for name in kept:
        shutil.copytree(SOURCE / "cells" / name, folder / "cells" / name)
        routes = {
            one["layer"]: one["route"]
            for one in json.loads((folder / "cells" / name / "plan.json").read_text())["layers"]
        }
        saliency = {layer: [float(place) for place in range(len(route))] for layer, route in routes.items()}
        (folder / "cells" / name / "saliency.json").write_text(json.dumps({"method": "any", "layers": saliency}))
    for path in [*folder.glob("records/*.json"), *folder.glob("baseline/*.json")]:
        _checksum(path, hashlib.sha256(path.with_suffix(".parquet").read_bytes()).hexdigest())
    notes = folder / "sweeps" / "20260101T000000-host-1" / "failures"
    notes.mkdir(parents=True)
    (notes / "00000.txt").write_text("method=reap: out of memory\n")
    return folder


def _checksum(record: Path, of: str) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | {"samples_sha256": of}))


def _bytes(content: bytes) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return damage


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _garbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 40] = bytes(range(200, 240))
    path.write_bytes(bytes(content))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    """Cannot be read, whoever reads: a link that leads back to itself."""
    path.unlink()
    path.symlink_to(path)


ANY: dict[str, Damage] = {
    "empty": _bytes(b""),
    "cut off": _cut,
    "garbled": _garbled,
    "a list": _bytes(b"[]"),
    "null": _bytes(b"null"),
    "no keys": _bytes(b"{}"),
    "a folder": _folder,
    "unreadable": _loop,
}


def _json(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


def _table(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Of a record from before checksums were kept, which would tell."""

    def damage(path: Path) -> None:
        pq.write_table(change(pq.read_table(path)), path)
        _checksum(path.with_suffix(".json"), "")

    return damage


def _first_layer(data: dict[str, Any]) -> dict[str, Any]:
    return next(iter(data["layers"].values()))


FILES = {
    "record": "records/*hc_smoe*.json",
    "samples": "records/*hc_smoe*.parquet",
    "baseline": "baseline/*.json",
    "baseline's samples": "baseline/*.parquet",
    "diagnostics": "diagnostics/*hc_smoe*.json",
    "plan": "cells/*hc_smoe*/plan.json",
    "saliency": "cells/*hc_smoe*/saliency.json",
}
WITHIN: dict[str, dict[str, Damage]] = {
    "record": {
        "a score is text": _json(lambda data: data["scores"][0].update(value="high")),
        "a score lacks its task": _json(lambda data: data["scores"][0].pop("task")),
        "scores are a number": _json(lambda data: data.update(scores=3)),
        "no id": _json(lambda data: data["cell"].pop("id")),
        "ratio is text": _json(lambda data: data["cell"].update(ratio="half")),
        "seed is null": _json(lambda data: data["cell"].update(seed=None)),
        "sizes are text": _json(lambda data: data["sizes"].update(weights_bytes="many")),
        "seconds are text": _json(lambda data: data["timings"].update(load="long")),
        "usage is a list": _json(lambda data: data.update(expert_usage=[1])),
        "version is text": _json(lambda data: data.update(version="two")),
        "version to come": _json(lambda data: data.update(version=99)),
        "config is a list": _json(lambda data: data.update(config=[])),
    },
    "samples": {
        "a column lacks": _table(lambda table: table.drop_columns(["score"])),
        "a column is another": _table(
            lambda table: table.set_column(table.column_names.index("score"), "score", table["item"])
        ),
        "no columns": _table(lambda table: table.select([])),
    },
    "diagnostics": {
        "a layer is null": _json(lambda data: data["layers"].update({next(iter(data["layers"])): None})),
        "a number is text": _json(lambda data: _first_layer(data).update(spread_before="wide")),
        "a number lacks": _json(lambda data: _first_layer(data).pop("measured_error")),
        "tokens are text": _json(lambda data: data.update(tokens="all")),
        "a score is null": _json(lambda data: data["scores"].append(None)),
    },
    "plan": {"a route is text": _json(lambda data: data["layers"][0].update(route="home"))},
    "saliency": {"layers are a list": _json(lambda data: data.update(layers=[1]))},
}


@dataclass(frozen=True)
class Damaged:
    """``where`` is a pattern of the file; ``of_claims``: the claims are tested on it too."""

    name: str
    where: str
    damage: Damage
    of_claims: bool = True


ALL = [
    Damaged(f"{what}: {name}", where, damage, of_claims=what not in ("plan", "saliency"))
    for what, where in FILES.items()
    for name, damage in (ANY | WITHIN.get(what, {})).items()
    # What has no layers has nothing to show.
    if (what, name) != ("saliency", "no keys")
]


@dataclass(frozen=True)
class Ending:
    """Of one report: the damaged file, its exit status, what it printed, and the error that it died of, if any."""

    file: str
    status: int
    told: str
    died: str


def run(one: Damaged, folder: Path, *words: str) -> Ending:
    """``winnow-report`` on a folder with the damage; ``folder`` is empty."""
    sound(folder)
    path = min(folder.glob(one.where))
    one.damage(path)
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            return Ending(path.name, cli.main([*words, str(folder)]), told.getvalue(), "")
        except Exception as error:  # what would be a traceback
            return Ending(path.name, 1, told.getvalue(), f"{type(error).__name__}: {error}")


def is_clear(one: Damaged, ending: Ending, folder: Path, report: str) -> bool:
    """The report is there, and a line names the file."""
    lines = [line for line in ending.told.splitlines() if "left out" in line]
    named = not one.of_claims and report == "claims.md" or any(ending.file in line for line in lines)
    written = (folder / "report" / report).read_text() if (folder / "report" / report).is_file() else ""
    in_report = "Left out" in written or not lines
    return ending.status == 0 and not ending.died and named and bool(written) and in_report


def results(folder: Path) -> dict[str, bool]:
    """Name of every damage, for both reports -> whether it gave one clear line and the rest of the report."""
    found = {}
    for place, one in enumerate(ALL):
        for words, report in (((), "report.md"), (("claims",), "claims.md")):
            here = folder / f"{place}{''.join(words)}"
            here.mkdir()
            found[f"{one.name} ({report})"] = is_clear(one, run(one, here, *words), here, report)
            shutil.rmtree(here)
    return found


def count(folder: Path) -> tuple[int, int]:
    """How many damages were told in one line of each report, and of how many."""
    found = results(folder)
    return sum(found.values()), len(found)
