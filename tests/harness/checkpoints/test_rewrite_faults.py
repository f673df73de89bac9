import errno
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from harness.checkpoints import writer as checkpoint_writer
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert, Source
from harness.errors import WinnowError
from tests.harness.checkpoints.compressed import identity_plan, merged, pruned, ragged_plan
from tests.tiny import save_tiny

GROUPS = ([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny(folder, "qwen3_moe", max_shard_size="100KB")
    return folder


def write(source: Path, plan: CompressionPlan, target: Path, **options):
    return apply_plan(source, plan, target, **options)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing_and_spares_what_was_there(source, tmp_path, monkeypatch, error):
    write(source, identity_plan(), tmp_path / "out")
    before = (tmp_path / "out" / "plan.json").read_bytes()
    calls = []

    def full(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return save_file(*args, **options)

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    for target in ("out", "new"):
        calls.clear()
        with pytest.raises(WinnowError, match="no space left") as caught:
            write(source, pruned([0, 1], [0, 1]), tmp_path / target)
        assert "\n" not in str(caught.value) and len(calls) == 2
    assert left_in(tmp_path) == ["out"]
    assert (tmp_path / "out" / "plan.json").read_bytes() == before


def test_an_interruption_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_writer, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source, identity_plan(), tmp_path / "out")
    assert left_in(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next(source, tmp_path):
    target = tmp_path / "out"
    save = checkpoint_writer.save_file

    def write_one_shard_and_die() -> None:
        checkpoint_writer.save_file = lambda *args, **options: (
            save(*args, **options),
            os.kill(os.getpid(), signal.SIGKILL),
        )
        write(source, pruned([0, 1], [0, 1]), target)

    process = multiprocessing.get_context("fork").Process(target=write_one_shard_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = left_in(tmp_path)
    assert left.startswith(".out.") and left.endswith(".partial")
    busy = tmp_path / left.replace(left.split("-")[-1], f"{os.getppid()}.partial")
    busy.mkdir()  # of a process that is alive
    write(source, pruned([0, 1], [0, 1]), target)
    assert left_in(tmp_path) == [busy.name, "out"]


def test_a_target_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(WinnowError, match="cannot write"):
            write(source, identity_plan(), target)
    assert left_in(tmp_path) == ["file"]


def test_an_existing_checkpoint_is_replaced_and_anything_else_is_not(source, tmp_path):
    write(source, identity_plan(), tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("")
    write(source, pruned([0, 1], [0, 1]), tmp_path / "out")
    assert read_config(tmp_path / "out")["num_local_experts"] == 2
    assert left_in(tmp_path) == ["out"] and "stale.txt" not in left_in(tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    (tmp_path / "note").write_text("")
    for precious in ("thesis", "note"):
        with pytest.raises(WinnowError, match="is not a checkpoint"):
            write(source, identity_plan(), tmp_path / precious)
    assert left_in(tmp_path / "thesis") == ["chapter.tex"]
    (tmp_path / "empty").mkdir()
    write(source, identity_plan(), tmp_path / "empty")
    assert "config.json" in left_in(tmp_path / "empty")


def test_the_source_is_never_the_target(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(WinnowError, match="cannot replace its source"):
            write(source, identity_plan(), target)
    assert (source / "config.json").is_file()


def expert_plan(*experts: NewExpert) -> CompressionPlan:
    route = tuple(min(j, len(experts) - 1) for j in range(8))
    return CompressionPlan((LayerPlan(0, experts, route), identity_plan().layers[1]))


@pytest.mark.parametrize(
    ("plan", "layout", "message"),
    [
        (identity_plan(layers=3), "compact", "MoE layers of the model"),
        (identity_plan(layers=1), "compact", "MoE layers of the model"),
        (identity_plan(num_experts=9), "compact", "routes 9 experts, but the model has 8"),
        (pruned([0], [0, 1]), "compact", "selects 2 a token"),
        (pruned([0, 1], [0, 1, 2]), "expanded", "layout=expanded needs"),
        (ragged_plan(), "expanded", "layout=expanded needs .* leaves 5 or 7"),
        (identity_plan(), "sideways", "unknown layout 'sideways'"),
        (expert_plan(NewExpert((Source(8),))), "compact", "old expert 8 does not exist"),
        (expert_plan(NewExpert((Source(0, float("nan")),))), "compact", "weight of old expert 0 is nan"),
        (expert_plan(NewExpert(())), "compact", "has no source"),
        (expert_plan(NewExpert((Source(0),), (0, 16))), "compact", "channel outside 0 to 15"),
        (expert_plan(NewExpert((Source(0),), (3, 3))), "compact", "kept twice"),
        (expert_plan(NewExpert((Source(0),), ())), "compact", "no channel is kept"),
        (expert_plan(NewExpert((Source(0, 1.0, (0, 1)),))), "compact", "no permutation of 16 channels"),
        (
            CompressionPlan((LayerPlan(0, (), (None,) * 8), identity_plan().layers[1])),
            "compact",
            "0 router rows",
        ),
        (
            CompressionPlan((replace(identity_plan().layers[0], route=(0,) * 8), identity_plan().layers[1])),
            "compact",
            "route must lead to every new expert",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(source, tmp_path, plan, layout, message):
    with pytest.raises(WinnowError, match=message) as caught:
        write(source, plan, tmp_path / "out", layout=layout)
    assert "\n" not in str(caught.value) and left_in(tmp_path) == []


def test_a_compressed_or_quantised_source_is_refused(source, tmp_path):
    write(source, merged(*GROUPS), tmp_path / "compact")
    with pytest.raises(WinnowError, match="already compressed"):
        write(tmp_path / "compact", identity_plan(), tmp_path / "out")
    config = read_config(source) | {"quantization_config": {"quant_method": "fp8"}}
    write(source, identity_plan(), tmp_path / "quantised")
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WinnowError, match="is quantised"):
        write(tmp_path / "quantised", identity_plan(), tmp_path / "out")


def test_a_truncated_source_is_refused_before_anything_is_written(source, tmp_path):
    write(source, identity_plan(), tmp_path / "in")
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(WinnowError, match=f"{shard.name} is truncated"):
        write(tmp_path / "in", identity_plan(), tmp_path / "out")
    assert left_in(tmp_path) == ["in"]
