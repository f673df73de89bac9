"""Different models that share a name are told apart wherever a report names them."""

import csv
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.record import Record
from harness.records.store import RecordStore
from reports.cli import main
from reports.figures import scores as figures
from reports.numbers.load import load_panels
from reports.numbers.models import telling_names
from tests.reports.synthetic import BASELINE, RIGHT, make_cell


def record(name: str, path: str | None, content: str) -> Record:
    config: dict[str, Any] = {"model": {"path": path}} if path else {}
    return Record({"model": name}, config, {}, {"model": f"sha256:{content * 16}"}, [], {}, {})


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([("m", "a/m", "1234"), ("n", "b/n", "5678")], ["m", "n"]),
        ([("m", "a/m", "1234"), ("m", "a/m", "1234")], ["m", "m"]),
        ([("m", "x/m", "1234"), ("m", "y/m", "1234")], ["m", "m"]),  # a copy is the same model
        ([("m", "a/m", "1234"), ("m", "b/m", "5678")], ["m (a/m)", "m (b/m)"]),
        ([("m", "a/x/m", "1234"), ("m", "b/x/m", "5678")], ["m (a/x/m)", "m (b/x/m)"]),
        ([("m", "/r/a/m", "1234"), ("m", "m", "5678"), ("m", "/r/b/m", "9abc")], ["m (a/m)", "m (m)", "m (b/m)"]),
        ([("m", "a/m", "1234"), ("m", "a/m", "5678")], ["m (12341234)", "m (56785678)"]),  # changed in place
        ([("m", None, "1234"), ("m", "a/m", "5678")], ["m (12341234)", "m (56785678)"]),
    ],
)
def test_names(models: list[tuple[str, str | None, str]], names: list[str]) -> None:
    assert telling_names([record(*one) for one in models]) == names


@pytest.mark.parametrize("with_baseline", [True, False])
def test_two_models_in_folders_of_one_name(
    with_baseline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, content in (("a", "1234"), ("b", "5678")):
        for kind, method, right in (("records", "reap", RIGHT["reap"][0.25]), ("baseline", "none", BASELINE)):
            if kind == "baseline" and not with_baseline:
                continue
            found, samples = make_cell(method, 0.25 if kind == "records" else 0.0, "code", 0, right)
            found.cell.update(model="m", id=f"{method}-{place}")
            if kind == "records" and with_baseline:
                found.cell["baseline"] = f"none-{place}"
            found.config["model"] = {"name": None, "path": f"{place}/m"}
            found.fingerprints["model"] = f"sha256:{content * 16}"
            RecordStore(tmp_path, kind).write(found, samples)
    panels = load_panels(tmp_path)
    assert [(p.model, [r.cell["id"] for r in p.records() if r.cell["method"] == "reap"]) for p in panels] == [
        ("m (a/m)", ["reap-a"]),
        ("m (b/m)", ["reap-b"]),
    ]
    monkeypatch.setattr(figures, "render", lambda figure, kind: b"")
    assert main([str(tmp_path)]) == 0 and main(["claims", str(tmp_path)]) == 0
    out = tmp_path / "report"
    for name in ("report.md", "claims.md", "page.html"):
        text = (out / name).read_text()
        assert "m (a/m)" in text and "m (b/m)" in text, name
    assert "# model m (a/m), suite" in (out / "report.md").read_text()
    with (out / "table.csv").open(newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"m (a/m)", "m (b/m)"}
