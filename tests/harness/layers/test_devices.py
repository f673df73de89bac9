"""Layer diagnostics on one and on two (pretend) GPUs, the models loaded to them from their checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.calibration.tokens import TokenSequence
from harness.checkpoints.load import load_model
from harness.contracts.alignment import align_channels
from harness.contracts.plan import CompressionPlan
from harness.families.table import FAMILIES
from harness.layers.diagnose import diagnose
from tests.harness.checkpoints.compressed import at_layers, merged
from tests.pretend import PretendGpus, halves
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, save_tiny

GROUPS = [[0, 3], [1, 2, 5, 7], [4], [6]]


def sequences() -> list[TokenSequence]:
    generator = np.random.default_rng(5)
    return [TokenSequence(generator.integers(0, 250, length), (length,), ("a",)) for length in (20, 13, 11)]


def diagnosed(folder: Path, plan: CompressionPlan, load: Any) -> tuple[list[float], list[str]]:
    """The numbers, and all else that is said."""
    scratch = folder.parent / "scratch"
    found = diagnose(folder, plan, sequences(), scratch, load, align_channels, pairs=2, batch_size=2)
    text = json.dumps(found)
    numbers = r"(?<=[ \[])-?\d+(?:\.\d+)?(?:e-?\d+)?(?=[,\]}])"
    return [float(one) for one in re.findall(numbers, text)], re.split(numbers, text)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_numbers_of_layers_on_gpus_are_those_of_the_cpu(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    plan = at_layers(merged(GROUPS, GROUPS[::-1]), FAMILIES[family].moe_layers(model.config.to_dict()))

    def loaded(gpus: int) -> Any:
        return lambda folder: load_model(folder, device="cuda:0" if gpus == 1 else halves(model))

    with sdpa_kernel(SDPBackend.MATH):
        expected, words = diagnosed(tmp_path / "model", plan, load_model)
        assert len(expected) > 200
        for gpus in (1, 2) if family in FAMILY_NAMES else (2,):
            with PretendGpus(gpus):
                found, said = diagnosed(tmp_path / "model", plan, loaded(gpus))
            assert said == words
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), "to rounding: weights lie at other addresses"
