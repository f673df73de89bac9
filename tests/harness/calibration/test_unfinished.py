"""A pass one layer at a time that is killed goes on where it was, and only the same pass does."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.calibration import hidden_states
from harness.calibration.collect import collect
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.streamed import StreamedModel
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.load import load_model
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from tests.harness.calibration.streams import assert_same, packed, plain, streamed
from tests.tiny import tiny_model

ALL, ROW = frozenset(STATISTICS), FAMILIES["deepseek_v3"]
TOKENS = [*plain((40, 33, 21, 9)), *packed()]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of three decoder layers: the first is dense."""
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def killed(layer: int, batch: int, work: Callable[[], object]) -> None:
    """``work`` in another process, which SIGKILL ends as ``batch`` is about to go into ``layer``."""
    run = ModelByLayer.run
    seen = []

    def run_or_die(self: ModelByLayer, at: int, *args: object) -> object:
        seen.append(at)
        if at == layer and seen.count(at) > batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, at, *args)

    child = os.fork()
    if child == 0:
        ModelByLayer.run = run_or_die
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that batches go through from now on."""
    run, seen = ModelByLayer.run, []

    def counted(self: ModelByLayer, layer: int, *args: object) -> object:
        seen.append(layer)
        return run(self, layer, *args)

    monkeypatch.setattr(ModelByLayer, "run", counted)
    return seen


@pytest.mark.parametrize(("layer", "batch", "again"), [(0, 1, 0), (1, 0, 1), (1, 3, 1), (2, 2, 2)])
def test_a_killed_pass_goes_on(layer, batch, again, model, tmp_path, monkeypatch) -> None:
    state = tmp_path / "state"
    killed(layer, batch, lambda: collect(streamed(model, state=state), TOKENS, ROW, ALL, 2))
    assert any(state.rglob("*.*"))
    seen = runs(monkeypatch)
    found = collect(streamed(model, state=state), TOKENS, ROW, ALL, 2)
    assert seen == [at for at in range(again, 3) for _ in range(4)]
    assert_same(found, collect(load_model(model), TOKENS, ROW, ALL, 2))
    assert not list(state.iterdir()), "nothing is left of it"


def test_a_pass_in_parts_goes_on_in_the_part_that_was_killed(model, tmp_path, monkeypatch) -> None:
    state = tmp_path / "state"

    def small() -> StreamedModel:
        return StreamedModel(streamed(model).model, memory=2 * 80 * 32 * 4, state=state)

    killed(2, 3, lambda: collect(small(), TOKENS, ROW, ALL, 2))
    seen = runs(monkeypatch)
    found = collect(small(), TOKENS, ROW, ALL, 2)
    assert seen == [2] * 3, "the three batches of the second part"
    assert_same(found, collect(load_model(model), TOKENS, ROW, ALL, 2), bound=1e-6)
    assert_same(found, collect(StreamedModel(small().model, small().memory), TOKENS, ROW, ALL, 2))


def test_gate_ratios_go_on_too(model, tmp_path, monkeypatch) -> None:
    state = tmp_path / "state"
    killed(2, 0, lambda: gate_ratio_counts(streamed(model, state=state), TOKENS, ROW, 2))
    seen = runs(monkeypatch)
    found = gate_ratio_counts(streamed(model, state=state), TOKENS, ROW, 2)
    assert seen == [2] * 4
    for layer, bins in gate_ratio_counts(load_model(model), TOKENS, ROW, 2).items():
        np.testing.assert_array_equal(found[layer], bins)


def test_only_the_same_pass_goes_on(model, tmp_path, monkeypatch) -> None:
    """Another model, corpus, number format, batch size or statistics: a pass from its beginning."""
    state = tmp_path / "state"
    killed(2, 1, lambda: collect(streamed(model, state=state), TOKENS, ROW, ALL, 2))
    tiny_model("deepseek_v3", seed=1).save_pretrained(tmp_path / "other")
    seen = runs(monkeypatch)
    for folder, dtype, sequences, names, size in (
        (tmp_path / "other", "float32", TOKENS, ALL, 2),
        (model, "bfloat16", TOKENS, ALL, 2),
        (model, "float32", TOKENS[:-1], ALL, 2),
        (model, "float32", TOKENS, ALL - {"gate_sum"}, 2),
        (model, "float32", TOKENS, ALL, 3),
    ):
        seen.clear()
        collect(streamed(folder, dtype, state=state), sequences, ROW, names, size)
        assert set(seen) == {0, 1, 2}
    seen.clear()
    collect(streamed(model, state=state), TOKENS, ROW, ALL, 2)
    assert seen == [2] * 4, "what was there is still there for the same pass"


def test_damaged_state_is_not_used(model, tmp_path, monkeypatch) -> None:
    state = tmp_path / "state"
    killed(2, 0, lambda: collect(streamed(model, state=state), TOKENS, ROW, ALL, 2))
    (path,) = state.rglob("layer-00001.npz")
    path.write_bytes(path.read_bytes()[:-40])
    seen = runs(monkeypatch)
    found = collect(streamed(model, state=state), TOKENS, ROW, ALL, 2)
    assert set(seen) == {0, 1, 2}, "what went into layer 1 is gone as well"
    assert_same(found, collect(load_model(model), TOKENS, ROW, ALL, 2))


def test_a_disk_that_is_too_small(model, tmp_path, monkeypatch) -> None:
    usage = hidden_states.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hidden_states.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(WinnowError, match="hidden states between two layers need .* free some, or set calibration.mem"):
        collect(streamed(model, state=tmp_path / "state"), TOKENS, ROW, ALL, 2)


def test_a_disk_that_fills_up_loses_no_layer(model, tmp_path, monkeypatch) -> None:
    written = []

    def pwrite(*args: object) -> int:
        written.append(args)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        return os.pwrite(*args)

    with monkeypatch.context() as full:
        full.setattr(hidden_states, "os", type("Full", (), {**vars(os), "pwrite": staticmethod(pwrite)}))
        with pytest.raises(WinnowError, match="no space left for .*behind-00001.bin: free some and run again"):
            collect(streamed(model, state=tmp_path / "state"), TOKENS, ROW, ALL, 2)
    seen = runs(monkeypatch)
    collect(streamed(model, state=tmp_path / "state"), TOKENS, ROW, ALL, 2)
    assert set(seen) == {1, 2}
