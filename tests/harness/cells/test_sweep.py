"""The grid of a sweep is counted as Hydra launches it."""

from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_module

from harness.cells.sweep import Grids, count_jobs


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["method=reap"], 1),
        (["method=reap,hc_smoe", "ratio=0.25,0.5", "calibration=code,math"], 8),
        (["ratio=0.25,0.5,0.75", "ratio=0.5"], 1),
        (["seed=range(0,3)", "method=choice(reap,random)"], 6),
        (["parts=[a:1,b:2]", "+experiment=demo", "~suite.tasks.math"], 1),
    ],
)
def test_count_jobs(overrides: list[str], jobs: int) -> None:
    assert count_jobs(overrides) == jobs


def test_several_grids_are_launched_together(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(jobs, initial_job_idx):
        launched.extend(jobs)
        return [SimpleNamespace(return_value=None) for _ in jobs]

    sweeper = Grids([{"method": "reap,random", "ratio": 0.5}, {"method": "hc_smoe", "ratio": "0.25,0.5", "seed": 1}])
    sweeper.config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=tmp_path / "logs")))
    sweeper.launcher = SimpleNamespace(launch=launch)
    monkeypatch.setattr(sweeper, "validate_batch_is_legal", lambda jobs: None)
    sweeper.sweep(["seed=0", "suite=none"])
    assert launched == [
        ["method=reap", "ratio=0.5", "seed=0", "suite=none"],
        ["method=random", "ratio=0.5", "seed=0", "suite=none"],
        ["method=hc_smoe", "ratio=0.25", "seed=0", "suite=none"],
        ["method=hc_smoe", "ratio=0.5", "seed=0", "suite=none"],
    ]


def test_the_claims_have_the_cells_that_they_need() -> None:
    """Every cell of every claim is a job of ``+experiment=claims``, and its suite has every task of the others."""
    from itertools import product

    from harness.cells.sweep import _choices, assignments
    from reports.claims.list import CLAIMS

    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["+experiment=claims"], return_hydra_config=True)
        others = [set(compose("config", [f"suite={name}"]).suite.tasks) for name in ("diagnostics", "answers")]
    assert set(config.suite.tasks) == set.union(*others)
    jobs = set()
    for grid in config.hydra.sweeper.grids:
        for job in product(*_choices(assignments(grid))):
            said = dict(one.split("=", 1) for one in job)
            layers = said.pop("diagnostics", "none")
            method, ratio = said.pop("method"), float(said.pop("ratio"))
            corpus = said.pop("calibration", "mixed")
            said.pop("seed", None)
            jobs |= {(method, ratio, corpus, frozenset(said.items()), one) for one in (layers, "none")}
    for claim in CLAIMS:
        layers = "layers" if "diagnostics=layers" in claim.also else "none"
        for cell in claim.cells():
            wanted = frozenset((key, str(value)) for key, value in cell.settings)
            if cell.method != "none" or wanted:
                assert (cell.method, cell.ratio, cell.calibration, wanted, layers) in jobs, claim.id
