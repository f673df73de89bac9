"""Grids of a sweep: their cells, and their configurations without Hydra's files for each."""

import itertools

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from harness.sweeps.composing import compose_all
from harness.sweeps.plugin import Grids, choices


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
def test_the_jobs_that_overrides_span(overrides: list[str], jobs: int) -> None:
    assert len(list(itertools.product(*choices(overrides)))) == jobs


def test_several_grids_are_one_sweep() -> None:
    sweeper = Grids(
        {"suite": "none"},
        [{"method": "reap,random", "ratio": 0.5}, {"method": "hc_smoe", "ratio": "0.25,0.5", "seed": 1}],
    )
    jobs = [job for grid in sweeper._grids() for job in itertools.product(*choices([*grid, "seed=0"]))]
    assert jobs == [
        ("method=reap", "ratio=0.5", "suite=none", "seed=0"),
        ("method=random", "ratio=0.5", "suite=none", "seed=0"),
        ("method=hc_smoe", "ratio=0.25", "seed=0", "suite=none"),
        ("method=hc_smoe", "ratio=0.5", "seed=0", "suite=none"),
    ]


SWEEPS = {
    "groups that write into one part": {
        "method": "reap,frequency", "allocation": "uniform,global", "ratio": "0.25,0.5", "calibration": "code,math",
    },
    "options of options": {"method": "coverage", "quantize": "int4,int8", "quantize.group_size": "row,8"},
    "values of every kind": {
        "method": "reap", "+more.here": "1,2", "seed": "range(0,3)", "calibration.parts": "{code:3},{math:2}",
        "suite": "reference", "~suite.tasks.math": "",
    },
    "an experiment and what it overrides": {"+experiment": "demo,reference", "method": "reap", "suite": "none,quick"},
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_is_what_hydra_composes(name: str) -> None:
    jobs = list(itertools.product(*choices([f"{k}={v}" if v else k for k, v in SWEEPS[name].items()])))
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        found = compose_all(loader, jobs)
        assert len(found) == len(jobs)
        for job, config in zip(jobs, found, strict=True):
            expected = loader.load_configuration("config", list(job), RunMode.RUN)
            with open_dict(expected):
                del expected["hydra"]
            assert OmegaConf.to_container(config) == OmegaConf.to_container(expected)
            assert OmegaConf.is_struct(config)


def test_many_cells_take_few_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        asked = []
        original = loader.load_configuration
        monkeypatch.setattr(loader, "load_configuration", lambda *a, **k: (asked.append(a), original(*a, **k))[1])
        grid = ["method=reap,random,hc_smoe", "calibration=code,math", "ratio=0.25,0.5", "seed=range(0,20)"]
        assert len(compose_all(loader, list(itertools.product(*choices(grid))))) == 240
        assert len(asked) <= 1 + 5 + 5 + 2


def test_what_cannot_be_composed_is_an_error() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for wrong in ("method=no_such_method", "colour=red", "~nothing"):
            with pytest.raises(HydraException):
                compose_all(loader, [["method=reap", "ratio=0.5"], ["method=reap", wrong]])
