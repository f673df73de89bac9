"""A method of a user's own, for tests of launchers: it writes down that it was asked, may be slow, and may fail."""

import os
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from harness.contracts.method import Decision
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.prune_experts import ExpertPruning

FAILS, SLOW, TRIES = "WINNOW_TEST_FAILS", "WINNOW_TEST_SLOW", "WINNOW_TEST_TRIES"


@dataclass(frozen=True)
class Odd(ExpertPruning):
    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        if len(statistics.layers) == 1:  # one made-up layer: an estimate of what is left
            return super().decide(statistics, ratio, seed)
        name = f"{self.name}__{float(ratio)}"
        with Path(os.environ[TRIES]).open("a") as file:
            file.write(f"{name}\n")
        if os.environ.get(FAILS) == name:
            raise WinnowError("it was told to fail")
        time.sleep(float(os.environ.get(SLOW, 0)))
        return super().decide(statistics, ratio, seed)
