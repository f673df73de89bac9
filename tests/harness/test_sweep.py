"""The grid of a sweep is counted as Hydra launches it."""

import pytest

from harness.sweep import count_jobs


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
