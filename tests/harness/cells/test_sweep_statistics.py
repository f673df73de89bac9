"""One calibration pass of a sweep collects what its methods need, and nothing that none of them asked for."""

import json
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from harness.cells.sweep import needed_statistics, statistics_of_sweep
from tests.harness.test_cli import _logging_as_before, corpus, local, model, winnow  # noqa: F401


def of(*methods: str) -> frozenset[str]:
    return frozenset.union(*(instantiate(compose("config", [f"method={name}"]).method).requires for name in methods))


def test_the_union_of_what_methods_declare():
    with initialize_config_module("conf", version_base="1.3"):
        grids = [["method=reap,hc_smoe", "ratio=0.25,0.5", "seed=0"], ["ratio=0.5", "method=naee"]]
        assert needed_statistics(grids) == of("reap", "hc_smoe", "naee")
        assert "output_mean" not in needed_statistics([["method=reap,frequency", "ratio=0.5"]])
        assert needed_statistics([["ratio=0.25,0.5"]]) == of("reap")  # the default method
        assert needed_statistics([["method=random,none"]]) == frozenset()
        assert "router_document_distance" in needed_statistics([["method=m_smoe", "method.variant=exact,reap_repo"]])


def test_a_method_that_cannot_be_made_needs_nothing():
    with initialize_config_module("conf", version_base="1.3"):
        assert needed_statistics([["method=reap,no_such_method"]]) == of("reap")
        assert needed_statistics([["method=reap", "method.scope=nowhere"]]) == frozenset()


def test_outside_of_a_sweep_nothing_else_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WINNOW_SWEEP_STATISTICS", raising=False)
    assert statistics_of_sweep() == frozenset()


def test_a_sweep_collects_once_what_its_methods_need(
    model: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    assert winnow(monkeypatch, "-m", *local(model, corpus, out), "method=reap,gate_sum", "ratio=0.25") == 0
    (manifest,) = (json.loads(path.read_text()) for path in out.glob("calibration/*/manifest.json"))
    with initialize_config_module("conf", version_base="1.3"):
        assert set(manifest["statistics"]) == of("reap", "gate_sum")
    assert os.environ["WINNOW_SWEEP_STATISTICS"]
