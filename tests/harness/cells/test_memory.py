"""A pretend device with a memory budget: nothing of the calibrating model is on it when the evaluation begins.

As on a GPU, what a process has taken of the device comes back with the end of the process alone. A ledger says which
process has taken how much; a model that does not fit beside what living processes hold is refused.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.apart import apart
from harness.backends import hf
from harness.cells import compress as compressing
from harness.cells import diagnostics, evaluate, run
from harness.errors import WinnowError
from tests.harness.cells.test_stale import config, folder  # noqa: F401
from tests.in_process import everything_here

LEDGER, BUDGET = "WINNOW_TEST_LEDGER", "WINNOW_TEST_BUDGET"
LOADERS = {compressing: "open_for_pass", diagnostics: "open_for_pass", hf: "load_model"}


def taking(load: Callable[..., Any]) -> Callable[..., Any]:
    """``load``, which takes the bytes of the model from the device. Raises WinnowError where it does not hold them."""

    def loaded(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        ledger, own = Path(os.environ[LEDGER]), sum(parameter.nbytes for parameter in model.parameters())
        entries = json.loads(ledger.read_text()) if ledger.exists() else []
        held = sum(entry["bytes"] for entry in entries if psutil.pid_exists(entry["process"]))
        ledger.write_text(json.dumps([*entries, {"process": os.getpid(), "bytes": own, "held": held}]))
        if held + own > int(os.environ[BUDGET]):
            raise WinnowError(f"the pretend device is full: {held} bytes are taken")
        return model

    return loaded


def on_the_device(function: Callable[..., Any], *args: Any) -> Any:
    """Runs in the process of its own."""
    for module, name in LOADERS.items():
        setattr(module, name, taking(getattr(module, name)))
    return function(*args)


@pytest.fixture
def cell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """A cell that calibrates, sets thresholds, evaluates two models and has diagnostics, on a device that holds one."""
    whole = (folder / "model" / "model.safetensors").stat().st_size
    monkeypatch.setenv(LEDGER, str(folder / "ledger.json"))
    monkeypatch.setenv(BUDGET, str(int(1.8 * whole)))
    return config(
        folder, "method=reap", "skip=calibrated", "diagnostics=layers", "diagnostics.tokens=20", "suite=reference",
        "suite.items=1", *(f"~suite.tasks.{name}" for name in ("math", "writing", "multiple_choice", "diversity")),
    )  # fmt: skip


def test_each_stage_finds_the_device_empty(cell: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for module in (run, evaluate, diagnostics):
        monkeypatch.setattr(module, "apart", lambda what, *work: apart(what, on_the_device, *work))
    run.run_cell(cell)
    entries = json.loads((folder / "ledger.json").read_text())
    by_process: dict[int, list[int]] = {}
    for entry in entries:
        by_process.setdefault(entry["process"], []).append(entry["held"])
    # calibration and thresholds; the uncompressed model; the compressed one; diagnostics of both
    assert [len(held) for held in by_process.values()] == [2, 1, 1, 2]
    assert all(held[0] == 0 for held in by_process.values())
    assert os.getpid() not in by_process


def test_in_one_process_the_device_would_be_full(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_here(monkeypatch)
    for module, name in LOADERS.items():
        monkeypatch.setattr(module, name, taking(getattr(module, name)))
    with pytest.raises(WinnowError, match="the pretend device is full"):
        run.run_cell(cell)
