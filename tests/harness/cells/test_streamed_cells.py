"""Cells whose model is read one decoder layer at a time: the records of a whole model, to the last digit."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoints.by_layer import ModelByLayer
from tests.harness.test_cli import _logging_as_before, corpus, local, model, winnow  # noqa: F401
from tests.in_process import everything_here

SWEEPS = {
    "one shot": ("method=reap,hc_smoe,coverage", "ratio=0.25,0.5", "diagnostics=layers", "diagnostics.tokens=16"),
    "rounds and thresholds": ("method=reap", "ratio=0.5", "schedule=iterative", "skip=calibrated"),
}


def told(out: Path) -> dict[str, Any]:
    """All that was decided, measured and written, by file; not how long it took."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.json")):
        name = str(path.relative_to(out))
        if name.startswith(("cells/", "records/", "diagnostics/")):
            found[name] = json.loads(path.read_text())
            for key in ("config", "timings", "versions", "written"):
                if isinstance(found[name], dict):
                    found[name].pop(key, None)
    return found


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_same_records(
    sweep: str,
    model: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything_here(monkeypatch)
    opened: list[Path] = []
    really = ModelByLayer.__init__

    def counted(self: ModelByLayer, folder: str | Path, *args: Any) -> None:
        opened.append(Path(folder))
        really(self, folder, *args)

    monkeypatch.setattr(ModelByLayer, "__init__", counted)
    outs = {name: tmp_path / name for name in ("always", "never")}
    for name, out in outs.items():
        opened.clear()
        words = local(model, corpus, out, *SWEEPS[sweep], f"calibration.stream={name}")
        assert winnow(monkeypatch, "-m", *words) == 0
        assert bool(opened) == (name == "always")
    found, expected = told(outs["always"]), told(outs["never"])
    assert len([name for name in expected if name.startswith("records/")]) == (6 if sweep == "one shot" else 1)
    assert found == expected
    assert not list((outs["always"] / "calibration").rglob("*.bin")), "nothing is left of the passes"
