"""Collectors: one for each declared statistic, shown what happens in a layer by a recorder that knows none of them."""

import numpy as np
import pytest
import torch

from harness.calibration.collected import Part
from harness.calibration.collectors.events import (
    AllTokens,
    BatchStart,
    BlockOutput,
    PairActivations,
    PairOutputs,
    RoutedPairs,
    RouterOutput,
    WeightedOutputs,
)
from harness.calibration.collectors.table import collectors_for
from harness.calibration.drive import drive
from harness.calibration.fused_experts import FusedExperts
from harness.calibration.recorder import Recorder
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import BY_ID, NOVICES, RELEASED, SAMPLED, SQUARE, STATISTICS
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from tests.tiny import tiny_model

EVENTS = (BatchStart, RouterOutput, RoutedPairs, PairActivations, PairOutputs, AllTokens, WeightedOutputs, BlockOutput)
SEEN = {
    "router": {RouterOutput},
    "routed pairs": {RoutedPairs, PairActivations, PairOutputs},
    "all tokens": {AllTokens},
    "samples": {BatchStart, RouterOutput, AllTokens},
    "block output": {WeightedOutputs, BlockOutput},
}


def experts(family: str = "qwen3_moe") -> FusedExperts:
    return FusedExperts(moe_block(tiny_model(family), FAMILIES[family], 1).experts)


@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_has_a_collector_that_sees_what_is_declared(name: str) -> None:
    found = collectors_for(frozenset({name}), 1, Part(0, 10), 300, experts())
    assert len(found) == (1 if name == "frequency" else 2), "the usage is always counted"
    assert set(found[-1].sees) <= SEEN[STATISTICS[name].sees]


def test_groups_of_statistics_follow_from_the_declarations() -> None:
    assert {"released_attribution", "released_activation"} == RELEASED
    assert {"sampled_inputs", "sampled_output_gram"} == SAMPLED
    assert {"token_ids"} == BY_ID
    assert STATISTICS.keys() >= NOVICES
    assert {"router_gram", "router_document_distance", "sampled_output_gram"} == SQUARE
    assert STATISTICS["token_ids"].sizes(8, 32, 16, vocabulary=300) == (8, 300)
    assert {name for name, declared in STATISTICS.items() if declared.itemsize != 8} == BY_ID
    assert STATISTICS["channel_square_sum"].sizes(8, 32, 16) == (8, 3, 16)
    assert STATISTICS["sampled_output_gram"].sizes(128, 32, 16) == (128, 128, 512)
    assert STATISTICS["sampled_inputs"].sizes(8, 32, 16, tokens=5) == (5, 32)


class Everything:
    """A collector that was made up: it keeps the shapes of all events, and counts what is no statistic."""

    sees = EVENTS

    def __init__(self, seen: list) -> None:
        self.seen = seen
        self.total = torch.zeros(())

    def add(self, event) -> None:
        shapes = {name: tuple(value.shape) for name, value in vars(event).items() if isinstance(value, torch.Tensor)}
        self.seen.append((type(event), shapes))
        if isinstance(event, PairOutputs):
            self.total += len(event.output)

    def running(self) -> dict:
        return {"pairs seen": self.total}

    def arrays(self) -> dict:
        return {"pairs seen": self.total.numpy()}


class OnlyBlocks(Everything):
    sees = (BlockOutput,)

    def arrays(self) -> dict:
        return {}


def sequences() -> list[TokenSequence]:
    return [TokenSequence(np.arange(length), (length,), ("a",)) for length in (6, 4, 3)]


def test_the_recorder_hands_events_to_a_collector_it_has_never_heard_of() -> None:
    seen, blocks, family = [], [], FAMILIES["qwen3_moe"]
    recorder = Recorder(1, family.router_output, lambda experts: [Everything(seen), OnlyBlocks(blocks)])
    drive(tiny_model("qwen3_moe"), family, sequences(), [recorder], batch_size=2)
    assert [event for event, _ in seen] == [*EVENTS, *EVENTS], "two batches"
    assert [event for event, _ in blocks] == [BlockOutput, BlockOutput]
    shapes = dict(seen[: len(EVENTS)])  # 2 sequences of 6 positions, 10 tokens of 8 experts, top-2
    assert shapes[RouterOutput] == {"inputs": (12, 32), "logits": (12, 8), "gates": (12, 2), "indices": (12, 2)}
    assert shapes[RoutedPairs] == {"expert": (20,), "token": (20,), "gate": (20,), "order": (20,), "ends": (8,)}
    assert shapes[PairActivations] == {"hidden": (12, 32), "gate_up": (20, 32), "activations": (20, 16)}
    assert shapes[PairOutputs] == {"output": (20, 32), "hidden": (12, 32), "activations": (20, 16)}
    assert shapes[AllTokens] == {"hidden": (12, 32)}
    assert shapes[WeightedOutputs]["slots"] == (12, 2, 32) and shapes[BlockOutput] == {"output": (12, 32)}
    assert recorder.arrays == {"pairs seen": 26}


def test_what_a_made_up_collector_breaks_is_named() -> None:
    class Broken(Everything):
        def running(self) -> dict:
            return {"pairs seen": self.total / 0}

    family = FAMILIES["olmoe"]
    model, recorder = tiny_model("olmoe"), Recorder(0, family.router_output, lambda experts: [Broken([])])
    with pytest.raises(WinnowError, match=r"infinite pairs seen in layer 0 \(statistics pairs seen\)"):
        drive(model, family, sequences(), [recorder], batch_size=2)
    assert recorder.arrays == {}, "nothing is finished"
    assert not model.model.layers[0].mlp.gate._forward_hooks


def test_nothing_is_computed_that_no_collector_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of usage alone: the products of the forward, and none besides."""
    calls = []
    linear = FusedExperts._linear
    monkeypatch.setattr(FusedExperts, "_linear", lambda self, x, *rest: calls.append(len(x)) or linear(self, x, *rest))
    lazy = [(RouterOutput, "scores"), (RouterOutput, "best"), (PairOutputs, "norms"), (AllTokens, "real")]
    lazy += [(PairOutputs, "moments")]
    for event, name in [*lazy, (RoutedPairs, "bounds"), (RoutedPairs, "documents"), (BlockOutput, "scale")]:
        monkeypatch.setattr(event, name, property(lambda self, name=name: pytest.fail(name)))
    family = FAMILIES["qwen3_moe"]
    model, recorders = tiny_model("qwen3_moe"), []
    for layer in (0, 1):
        make = lambda experts: collectors_for(frozenset({"gate_sum"}), 1, Part(0, 13), 300, experts)  # noqa: E731
        recorders.append(Recorder(layer, family.router_output, make))
    drive(model, family, sequences(), recorders, batch_size=3)
    assert calls == [26] * 4  # gate and up, and down, of the routed pairs of each layer


def test_observers_of_one_layer_need_no_other() -> None:
    """As a driver has it that holds one layer at a time: each is watched for itself and gives the same.

    Without padding, which a layer that nobody watches computes as well.
    """
    family, model = FAMILIES["deepseek_v3"], tiny_model("deepseek_v3")
    names = frozenset(STATISTICS)

    def recorders() -> list[Recorder]:
        make = lambda experts: collectors_for(names, 1, Part(0, 13), 300, experts)  # noqa: E731
        return [Recorder(layer, family.router_output, make) for layer in (1, 2)]

    together, apart = recorders(), recorders()
    drive(model, family, sequences(), together, batch_size=1)
    for one in apart:
        drive(model, family, sequences(), [one], batch_size=1)
    for one, other in zip(together, apart, strict=True):
        for name in names:
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
