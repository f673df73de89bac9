"""Cells with refit= and router=: names, records, plans, checkpoints, and the text that errors are measured on."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from harness.cells import run as experiment
from harness.cells.cell import prepare
from harness.cells.dry_run import report
from harness.checkpoints.load import load_model
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.plan_files import load_plan
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from tests.harness.refit import direct
from tests.tiny import byte_tokenizer, save_tiny

CONF = str(Path(experiment.__file__).parents[2] / "conf")
WORDS = ("merge", "prune", "router", "expert", "gate", "token", "layer", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder / "model", "olmoe")
    rng = np.random.default_rng(0)
    for name, count in (("corpus", 16), ("other", 5)):
        lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 9).tolist())}) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def configured(folder: Path, out: Path, *more: str):
    given = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none", f"output_dir={out}",
        "progress=false", "ratio=0.5", *more,
    ]  # fmt: skip
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=given)


def run(folder: Path, out: Path, *more: str):
    return experiment.run_cell(configured(folder, out, *more), publish=True)


def text(folder: Path, name: str) -> list:
    tokenizer = byte_tokenizer()
    rows = [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    found = [np.array(tokenizer(row)["input_ids"][:64]) for row in rows]
    return [direct.TokenSequence(ids, (len(ids),), ("local",)) for ids in found]


def layer_errors(folder: Path, checkpoint: Path, sequences: list) -> dict[str, float]:
    """Each compressed block, router and all, on what that of the intact model is given."""
    intact, left = direct.intact(folder / "model"), load_model(checkpoint, "float64")
    found = {}
    for layer in (0, 1):
        seen = direct.seen(intact, "olmoe", layer, sequences)
        with torch.no_grad():
            block = moe_block(left, FAMILIES["olmoe"], layer).block
            output = block(torch.from_numpy(seen.x).unsqueeze(0))
        output = (output[0] if isinstance(output, tuple) else output)[0].numpy()
        found[str(layer)] = np.square(seen.output - output).sum() / np.square(seen.output).sum()
    return found


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        (("method=hc_smoe", "refit=routed"), ["routed"]),
        (("method=reap", "refit=joint"), ["joint"]),
        (("method=magnitude_channels", "refit=routed"), ["routed"]),
        (("method=m_smoe", "refit=all_tokens", "refit.alpha=0.1"), ["all_tokens"]),
        (("method=mergemoe",), ["all_tokens"]),
        (("method=mergemoe", "refit=routed"), ["all_tokens", "routed"]),
        (("method=partial", "refit=joint", "refit.sweeps=3"), ["joint"]),
    ],
)
def test_the_checkpoint_has_the_errors_of_the_record(folder: Path, tmp_path: Path, settings, fits):
    more = (*settings, f"calibration.heldout={folder / 'other.jsonl'}")
    record = run(folder, tmp_path, *more)
    told = record.recovery["refit"]
    assert record.recovery["heldout"] == "calibration.heldout"
    assert [fit["objective"] for fit in told["fits"]] == fits
    calibration, other = text(folder, "corpus"), text(folder, "other")
    counts = [sum(len(each.input_ids) for each in some) for some in (calibration, other)]
    assert [told["tokens"], told["heldout_tokens"]] == counts
    for name, sequences in (("calibration", calibration), ("heldout", other)):
        for layer, error in layer_errors(folder, tmp_path / "checkpoint", sequences).items():
            assert len(told["layers"][layer][name]) == len(fits) + 1
            assert told["layers"][layer][name][-1] == pytest.approx(error, rel=1e-4)
    plan = load_plan(tmp_path / "plan.json")
    downs = {(x.layer, i): e.down for x in plan.layers for i, e in enumerate(x.experts) if e.down is not None}
    assert downs and (tmp_path / "plan.safetensors").is_file()
    refitted = {layer: sum(at == int(layer) for at, _ in downs) for layer in record.plan}
    assert {layer: record.plan[layer].get("refitted", 0) for layer in record.plan} == refitted
    assert {"refit"} <= record.timings.keys()


def test_it_lowers_the_error_of_the_bare_method(folder: Path, tmp_path: Path):
    for method, refit in (("hc_smoe", "routed"), ("reap", "joint"), ("magnitude_channels", "routed")):
        bare = run(folder, tmp_path / method, f"method={method}")
        assert bare.recovery == {} and not (tmp_path / method / "plan.safetensors").exists()
        before = layer_errors(folder, tmp_path / method / "checkpoint", text(folder, "corpus"))
        record = run(folder, tmp_path / f"{method}-{refit}", f"method={method}", f"refit={refit}")
        for layer, error in before.items():
            first, last = record.recovery["refit"]["layers"][layer]["calibration"]
            assert first == pytest.approx(error, rel=1e-4) and last < 0.9 * first


def test_names_tell_refitted_cells_apart_and_others_are_as_they_were(folder: Path, tmp_path: Path):
    def described(*more: str) -> dict:
        return prepare(configured(folder, tmp_path, *more)).description

    bare = described("method=hc_smoe")
    assert not {"refit", "router"} & bare.keys()
    words = {}
    for more, word in (
        (("refit=routed",), "routed-refit"),
        (("refit=routed", "refit.alpha=0.001"), "routed-refit-alpha0.001"),
        (("refit=joint", "refit.sweeps=5", "refit.tokens=4096"), "joint-refit-tokens4096-sweeps5"),
        (("refit=all_tokens",), "all_tokens-refit"),
    ):
        found = described("method=hc_smoe", *more)
        assert found["refit"] == word and f"__{word}-" in found["id"]
        words[found["id"]] = word
    both = described("method=hc_smoe", "refit=routed", "router=recalibrated")
    assert (both["refit"], both["router"]) == ("routed-refit", "recalibrated-router")
    assert len({*words, both["id"], bare["id"]}) == 6
    # A method without statistics reads the text now; the uncompressed model has nothing to repair.
    assert described("method=weight_norm")["calibration"] == "none"
    assert described("method=weight_norm", "refit=joint")["calibration"] == "local"
    none = [described("method=none", "ratio=0", *more) for more in ((), ("refit=joint", "router=recalibrated"))]
    assert none[0] == none[1]
    assert described("method=mergemoe")["id"] != described("method=mergemoe", "calibration.all_tokens=64")["id"]
    assert described("method=hc_smoe", "calibration.all_tokens=64")["id"] == bare["id"]


def test_streamed_and_whole_calibration_give_the_same_refit(folder: Path, tmp_path: Path):
    plans = []
    for stream in ("always", "never"):
        run(folder, tmp_path / stream, "method=hc_smoe", "refit=routed", f"calibration.stream={stream}")
        plans.append(load_plan(tmp_path / stream / "plan.json"))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("method", ["reap", "hc_smoe"])
def test_a_recalibrated_router_is_in_the_checkpoint(folder: Path, tmp_path: Path, method: str):
    record = run(folder, tmp_path, f"method={method}", "router=recalibrated", "router.alpha=0.001")
    told, plan = record.recovery["router"], load_plan(tmp_path / "plan.json")
    assert "refit" not in record.recovery and told["alpha"] == 0.001 and "router" in record.timings
    reader = CheckpointReader(tmp_path / "checkpoint")
    for layer in plan.layers:
        np.testing.assert_array_equal(
            reader.tensor(f"model.layers.{layer.layer}.mlp.gate.weight").numpy(), layer.router.values
        )
        errors = told["layers"][str(layer.layer)]
        assert errors["calibration"][1] <= errors["calibration"][0] + 1e-12
    assert told["layers"]["1"]["calibration"][1] < told["layers"]["1"]["calibration"][0]
    assert not (tmp_path / "cells" / record.cell["id"] / "bare").exists()


def test_held_out_text_is_another_draw_or_said_to_be_missing(folder: Path, tmp_path: Path, caplog):
    drawn = run(folder, tmp_path / "drawn", "method=hc_smoe", "refit=routed", "calibration.num_sequences=10")
    assert drawn.recovery["heldout"] == "another draw of the corpus"
    told = drawn.recovery["refit"]
    assert 0 < told["heldout_tokens"] < told["tokens"] and told["layers"]["0"]["heldout"][1] > 0
    with caplog.at_level(logging.INFO):
        whole = run(folder, tmp_path / "whole", "method=hc_smoe", "refit=routed")
    told = "not measured: the corpus has no other text; calibration.heldout=FILE names some"
    assert whole.recovery["heldout"] == told
    assert whole.recovery["refit"]["heldout_tokens"] == 0 and "not measured" in caplog.text
    assert {layer["heldout"] for layer in whole.recovery["refit"]["layers"].values()} == {None}
    with pytest.raises(WinnowError, match=r"calibration.heldout=.*: all its texts are in the calibration corpus"):
        run(folder, tmp_path / "x", "method=hc_smoe", "refit=routed", f"calibration.heldout={folder / 'corpus.jsonl'}")
    with pytest.raises(WinnowError, match=r"calibration corpus .*none.jsonl does not exist"):
        run(folder, tmp_path / "x", "method=hc_smoe", "refit=routed", f"calibration.heldout={folder / 'none.jsonl'}")


def test_settings_that_cannot_be_are_one_line(folder: Path, tmp_path: Path):
    for given, told in (
        ("refit.alpha=0", r"refit.alpha=0"),
        ("refit.tokens=0", r"refit.tokens=0"),
        ("refit.name=all", "unknown refit 'all': choose none, routed, joint, all_tokens"),
    ):
        with pytest.raises(WinnowError, match=told):
            prepare(configured(folder, tmp_path, "method=hc_smoe", "refit=routed", given))


def test_a_dry_run_tells_what_both_take(folder: Path, tmp_path: Path):
    shown, _ = report(configured(folder, tmp_path, "method=reap", "refit=joint", "router=recalibrated"))
    refit, router = (
        next(line for line in shown.splitlines() if line.startswith(name)) for name in ("refit", "router ")
    )
    assert "outputs of 131,072 tokens" in refit and "sums" in refit and "on the host" in refit
    assert "twice one layer" in router
    assert "refit" in report(configured(folder, tmp_path, "method=mergemoe"))[0]
    assert "refit" not in report(configured(folder, tmp_path, "method=hc_smoe"))[0].split("disk:")[0].split("stage")[1]


def test_a_plan_that_is_not_kept_is_fitted_again(folder: Path, tmp_path: Path):
    record = run(folder, tmp_path, "method=hc_smoe", "refit=routed", "router=recalibrated")
    cell = prepare(configured(folder, tmp_path, "method=hc_smoe", "refit=routed", "router=recalibrated"))
    kept = tmp_path / "cells" / record.cell["id"]
    plan = load_plan(kept / "plan.json")
    for path in kept.glob("plan.*"):
        path.unlink()
    again = experiment._plan_of(cell, record, kept, tmp_path)
    assert again == plan
