"""The panel's sweep: its cells, and models whose weights are not there."""

import itertools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import harness.cli  # noqa: F401  # its resolvers
from harness.exits import explain
from harness.reference.variants import VARIANTS
from harness.sweeps.plugin import choices


def test_every_model_of_the_panel_has_the_same_cells() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["+experiment=panel"], return_hydra_config=True)
    found: dict[str, list[tuple[str, ...]]] = {}
    for grid in OmegaConf.to_container(config.hydra.sweeper.grids, resolve=True):
        for model, *rest in itertools.product(*choices([f"{key}={value}" for key, value in grid.items()])):
            found.setdefault(model.removeprefix("model="), []).append(tuple(rest))
    assert set(found) == {"reference", *(f"panel_{name}" for name in VARIANTS)}
    first = found["reference"]
    assert all(sorted(of_model) == sorted(first) for of_model in found.values())
    assert len(set(first)) == len(first) == 7 * 2 * 4 + 5 + 2 * 8
    assert config.suite["items"] == 150 and "calibration_error" in config.suite.tasks


def test_a_model_that_was_not_trained_says_how_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["model=panel_coarse"])
    with pytest.raises(Exception, match="coarse") as raised:
        _ = config.model.path
    line = explain(raised.value)
    assert line is not None and line.startswith(
        "the weights of the panel's model 'coarse' are not at .panel/coarse/model"
    )
    assert line.endswith("python -m harness.reference.train --variant coarse")
