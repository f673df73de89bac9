"""Who changes what a method decides or how a task scores raises its version: old and new results are never mixed."""

import pytest

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, prune
from methods.prune_experts import ExpertPruning
from tests import golden


@pytest.mark.parametrize("kind", golden.KINDS)
def test_behaviour_is_that_of_its_version(kind: str):
    found, stored = golden.KINDS[kind](), golden.stored()[kind]
    for name, now in found.items():
        before = stored.get(name)
        assert before is not None, f"{name} is new: write it down with python -m tests.golden"
        if now["digest"] != before["digest"]:
            assert now["version"] != before["version"], f"{name} behaves otherwise: raise its version"
        assert now == before, f"{name} has another version: write it down with python -m tests.golden"
    assert set(found) == set(stored), "a method or task is gone: python -m tests.golden"


def test_another_decision_under_the_same_version_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def decide(self, statistics, ratio, seed):
        return Decision(CompressionPlan(tuple(prune(layer, 12, range(6)) for layer in sorted(statistics.layers))))

    monkeypatch.setattr(ExpertPruning, "decide", decide)
    with pytest.raises(AssertionError, match="behaves otherwise: raise its version"):
        test_behaviour_is_that_of_its_version("decisions")
