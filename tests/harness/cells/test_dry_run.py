"""The dry run against the truth: headers of saved models, sizes of real runs, bytes of collected statistics."""

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.backends.counter import counter_of
from harness.calibration.collect import collect, wanted_statistics
from harness.calibration.streamed import MARGIN, STACKING
from harness.calibration.tokens import tokenize
from harness.cells import dry_run
from harness.cells.cell import tasks_of
from harness.cells.gpu_sizes import gpus_needed
from harness.cells.needs import longest_request
from harness.cells.outcomes import anatomy, checkpoint_bytes
from harness.cells.stages import Stage
from harness.checkpoints import hub
from harness.checkpoints import load as loading
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.footprint import (
    Kept,
    activation_bytes,
    anatomy_of_config,
    anatomy_of_folder,
    cache_bytes_per_token,
    compressed,
    outcome,
    quantised_bytes,
    statistics_bytes,
)
from harness.checkpoints.quantize import Quantization, quantize_checkpoint
from harness.checkpoints.reader import CheckpointReader
from harness.data.rows import Document
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from harness.text import human
from tests.harness.checkpoints.compressed import merged, pruned, sliced
from tests.harness.test_cli import _logging_as_before, local, winnow  # noqa: F401 (a fixture of every test)
from tests.tiny import ALL_FAMILIES, byte_tokenizer, save_tiny, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ALL_FAMILIES}
    for name, folder in made.items():
        save_tiny(folder, name, max_shard_size="50KB")
    return made


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in ("def f(x): ", "3 and 4 ", "the mill ")))
    return path


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    reader = CheckpointReader(folder)
    return {name: (reader.shape(name), reader.nbytes(name)) for name in reader.names()}


def of_headers(headers) -> dict[str, tuple[tuple[int, ...], int]]:
    return {name: (headers.shape(name), headers.nbytes(name)) for name in headers.names()}


def method_named(name: str, *overrides: str):
    with initialize_config_module("conf", version_base="1.3"):
        return instantiate(compose("config", overrides=[f"method={name}", *overrides]).method)


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_config_tells_what_a_saved_model_holds(folders, family):
    made = anatomy_of_config(read_config(folders[family]))
    assert of_headers(made.headers) == stored(folders[family])
    assert made.headers.parameters == sum(tensor.numel() for tensor in tiny_model(family).state_dict().values())
    read = anatomy_of_folder(folders[family], read_config(folders[family]))
    assert read.headers.total_bytes == made.headers.total_bytes
    assert read.largest_shard == max(path.stat().st_size for path in folders[family].glob("*.safetensors"))


def test_tied_embeddings_count_once_and_bf16_takes_two_bytes(tmp_path):
    model = tiny_model("qwen3_moe")
    config = model.config
    config.tie_word_embeddings = True
    type(model)(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert of_headers(anatomy_of_config(read_config(tmp_path)).headers) == stored(tmp_path)


def test_active_parameters_are_all_but_the_idle_experts(folders):
    model = anatomy_of_config(read_config(folders["qwen3_moe"]))
    an_expert = 3 * 32 * 16
    assert model.expert_parameters == 2 * 8 * an_expert
    assert model.active_parameters == model.headers.parameters - 2 * 6 * an_expert


# --- what a method leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ratio", "kept"),
    [
        ("reap", "0.25", Kept((16,) * 6, 6)),
        ("random", "0.5", Kept((16,) * 4, 4)),
        ("weight_norm", "0.25", Kept((16,) * 6, 6)),
        ("hc_smoe", "0.5", Kept((16,) * 4, 8)),
        ("m_smoe", "0.25", Kept((16,) * 6, 8)),
        ("activation_channels", "0.5", Kept((8,) * 8, 8)),
        ("none", "0", Kept((16,) * 8, 8)),
    ],
)
def test_methods_say_themselves_what_they_leave(folders, name, ratio, kept):
    model = anatomy_of_folder(folders["qwen3_moe"], read_config(folders["qwen3_moe"]))
    assert outcome(method_named(name), Fraction(ratio), model) == kept


def test_ragged_experts_keep_the_budget(folders):
    model = anatomy_of_folder(folders["qwen3_moe"], read_config(folders["qwen3_moe"]))
    kept = outcome(method_named("coverage", "method.min_channels=1"), Fraction(1, 2), model)
    assert len(set(kept.widths)) > 1 and sum(kept.widths) == 8 * 16 // 2


PLANS = {
    "pruned": (pruned([0, 1, 2, 5], [2, 4, 6, 7]), Kept((16,) * 4, 4)),
    "merged": (merged([[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]), Kept((16,) * 4, 8)),
    "sliced": (sliced(pruned(range(8), range(8)), [0, 3, 5], [1, 2, 9]), Kept((3,) * 8, 8)),
}


@pytest.mark.parametrize("layout", ["compact", "expanded"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "minimax_m2"])
def test_sizes_afterwards_are_those_that_are_written(folders, tmp_path, family, plan, layout):
    model = anatomy_of_folder(folders[family], read_config(folders[family]))
    made, kept = PLANS[plan]
    apply_plan(folders[family], made, tmp_path / "out", layout)
    assert of_headers(compressed(model, kept, layout).headers) == stored(tmp_path / "out")


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8, "symmetric": False, "targets": "linear"}])
def test_quantised_sizes_are_those_that_are_written(folders, tmp_path, options):
    quantization = Quantization("q", **options)
    model = anatomy_of_folder(folders["qwen3_moe"], read_config(folders["qwen3_moe"]))
    plan, kept = PLANS["pruned"]
    apply_plan(folders["qwen3_moe"], plan, tmp_path / "out")
    quantize_checkpoint(tmp_path / "out", tmp_path / "out", quantization)
    written = sum(nbytes for _, nbytes in stored(tmp_path / "out").values())
    assert quantised_bytes(compressed(model, kept), quantization) == written


@pytest.mark.parametrize(
    ("method", "ratio"), [("reap", "0.25"), ("hc_smoe", "0.5"), ("activation_channels", "0.5"), ("coverage", "0.25")]
)
def test_a_cell_weighs_what_its_dry_run_said(folders, corpus, tmp_path, monkeypatch, capsys, method, ratio):
    out = tmp_path / "out"
    arguments = local(folders["olmoe"], corpus, out, f"method={method}", f"ratio={ratio}")
    assert winnow(monkeypatch, *arguments, "dry_run=true") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{ratio} "))
    about, said = re.search(r"(~?)([\d,]+) +[\d.]+ [kMG]?B", line).groups()
    assert winnow(monkeypatch, *arguments) == 0
    now = stored(out / "checkpoint")
    of_routers = {name for name in now if name.endswith("gate.weight")}
    written = sum(nbytes for name, (_, nbytes) in now.items() if about == "" or name not in of_routers)
    assert bool(about) == (method == "coverage")
    assert 0 <= int(said.replace(",", "")) - written <= (2 * 8 * 32 * 4 if about else 0)


# --- memory ----------------------------------------------------------------------------------------------------------


def sequences(count: int, length: int):
    documents = [Document(f"{number} " * length, "x") for number in range(count)]
    return tokenize(documents, byte_tokenizer(), length)


def test_statistics_take_the_bytes_that_were_said(folders):
    model = anatomy_of_config(read_config(folders["deepseek_v3"]))
    names = wanted_statistics("all", frozenset({"released_activation", "released_attribution"}))
    collected = collect(tiny_model("deepseek_v3"), sequences(2, 16), FAMILIES["deepseek_v3"], names)
    taken = sum(array.nbytes for arrays in collected.layers.values() for array in arrays.values())
    assert statistics_bytes(model, names) == taken


def test_activations_stay_below_what_was_said_and_not_far(tmp_path):
    save_tiny(tmp_path, "qwen3_moe", hidden=128, width=96, top_k=4)
    model, tokens = tiny_model("qwen3_moe", hidden=128, width=96, top_k=4), 4 * 256
    names = wanted_statistics("all", frozenset())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        collect(model, sequences(4, 256), FAMILIES["qwen3_moe"], names, batch_size=4)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    said = activation_bytes(anatomy_of_folder(tmp_path, read_config(tmp_path)), tokens, 4)
    assert said / 3 < peak <= said


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_cache_takes_the_bytes_a_token_that_were_said(folders, family):
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(6).unsqueeze(0), use_cache=True).past_key_values
    keys = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4]
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in keys)
    assert cache_bytes_per_token(anatomy_of_config(read_config(folders[family])), 4) * 6 == taken


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run must not load a weight")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    yield


def test_it_writes_nothing_and_shows_a_ladder(folders, corpus, tmp_path, monkeypatch, capsys, no_weights):
    out = tmp_path / "out"
    arguments = local(folders["deepseek_v3"], corpus, out, "ratio=0.9", "calibration.batch_size=2")
    assert winnow(monkeypatch, *arguments, "dry_run=true") == 2
    shown = capsys.readouterr()
    assert not out.exists()
    assert "family      deepseek_v3; router: sigmoid" in shown.out
    assert "MoE layers  2 of 3" in shown.out and "8 in a layer, top-2, 16 channels" in shown.out
    assert re.search(r"^0\.25 +6 +6 +16 ", shown.out, re.M)
    assert re.search(r"^0\.125 +refused: .*2 groups cannot share evenly", shown.out, re.M)
    assert re.search(r"^0\.9 +refused: .*largest ratio that works", shown.out, re.M)
    assert "(2 x 64 tokens)" in shown.out
    assert "winnow: ratio 0.9 leaves" in shown.err


def test_a_sweep_shows_each_cell(folders, corpus, tmp_path, monkeypatch, capfd, no_weights):
    out = tmp_path / "out"
    arguments = local(folders["olmoe"], corpus, out, "method=reap,hc_smoe", "ratio=0.25,0.99", "dry_run=true")
    assert winnow(monkeypatch, "-m", *arguments) == 0
    shown = capfd.readouterr().out
    assert len(re.findall(r"^calibrate ", shown, re.M)) == 2 and len(re.findall(r"^cell  .* method=", shown, re.M)) == 2
    assert len(re.findall(r"ratio=0.99 +ratio 0.99 leaves", shown)) == 2
    assert not out.exists()


def test_a_suite_needs_weights_and_a_cache(folders, tmp_path, monkeypatch, capsys, no_weights):
    arguments = [
        "model=local", f"model.path={folders['olmoe']}", "backend=hf", "backend.open.batch_size=2", "dry_run=true",
        "backend.open.max_length=100", f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert winnow(monkeypatch, *arguments) == 0
    a_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key-value heads, their size, float32
    assert f"(2 x 100 tokens of {human(a_token)}; as was asked for)" in capsys.readouterr().out


def dry(folder: Path, tmp_path: Path, *more: str) -> str:
    given = ["model=local", f"model.path={folder}", f"output_dir={tmp_path / 'out'}", *more]
    with initialize_config_module("conf", version_base="1.3"):
        return dry_run.report(compose("config", overrides=given))[0]


def memory(text: str, stage: str) -> str:
    return next(words[1] for line in text.splitlines() if (words := re.split(" {2,}", line))[0] == stage)


def test_the_baseline_is_evaluated_too(folders, tmp_path):
    given = ["ratio=0.5", "suite.items=3", "backend=hf", "backend.open.max_length=64", "backend.open.batch_size=2"]
    text = dry(folders["olmoe"], tmp_path, *given)
    model = anatomy_of_folder(folders["olmoe"], read_config(folders["olmoe"]))
    cache = 2 * 64 * cache_bytes_per_token(model, 4)
    assert memory(text, "baseline's evaluation") == human(model.headers.total_bytes + cache)
    half = compressed(model, Kept((16,) * 4, 4))
    assert memory(text, "evaluation") == human(half.headers.total_bytes + cache)
    skipped = dry(folders["olmoe"], tmp_path, *given, "baseline=skip")
    assert memory(skipped, "baseline's evaluation") == "none" and "baseline=skip does not open" in skipped
    alone = dry(folders["olmoe"], tmp_path, *given[1:], "method=none", "ratio=0")
    assert memory(alone, "evaluation") == memory(text, "baseline's evaluation") and "baseline's" not in alone


def test_the_length_is_counted_where_tokenizer_and_items_are_here_and_assumed_elsewhere(folders, tmp_path, monkeypatch):
    given = ["suite=reference", "suite.items=3", "backend=vllm", "ratio=0.5"]
    monkeypatch.setattr("harness.backends.vllm_guard.reason_against", lambda config: "")
    with initialize_config_module("conf", version_base="1.3"):
        suite = compose("config", overrides=given[:2]).suite
    longest = longest_request(
        tasks_of({"suite": OmegaConf.to_container(suite, resolve=True)}), counter_of(folders["olmoe"])
    )
    limit = read_config(folders["olmoe"])["max_position_embeddings"]
    assert longest is not None and longest < limit
    a_token = cache_bytes_per_token(anatomy_of_folder(folders["olmoe"], read_config(folders["olmoe"])), 4)
    told = f"KV cache at least {human((longest + 1) * a_token)} (one sequence of {longest + 1} tokens"
    text = dry(folders["olmoe"], tmp_path, *given)
    assert text.count(told) == 2 and "; the suite's longest)" in text
    absent = dry(folders["olmoe"], tmp_path, f"data.root={tmp_path}", "suite=paper_math", *given[2:])
    assert "assumed, since the items cannot be counted here" in absent
    monkeypatch.setattr(dry_run, "local_folder", lambda path: None)
    assert "assumed, since the tokenizer is not here" in dry(folders["olmoe"], tmp_path, *given)


@pytest.mark.parametrize("stream", ["auto", "always", "never"])
def test_calibration_by_layer_needs_one_layer(folders, tmp_path, corpus, stream):
    given = [f"calibration.stream={stream}", "calibration=local", f"calibration.path={corpus}", "suite=none"]
    text = dry(
        folders["olmoe"], tmp_path, *given, "ratio=0.5", "calibration.num_sequences=10", "calibration.max_length=64"
    )
    model = anatomy_of_folder(folders["olmoe"], read_config(folders["olmoe"]))
    assert (re.search(r"^calibration  ", text, re.M) is None) == (stream == "always")
    assert ("calibration by layer" in text) == (stream != "never")
    if stream == "never":
        return
    sizes = model.headers.bytes.items()
    layers = [sum(size for name, size in sizes if name.startswith(f"model.layers.{i}.")) for i in (0, 1)]
    layer, embedding = int(STACKING * max(layers)), model.headers.nbytes("model.embed_tokens.weight")
    hidden = human(10 * 64 * 32 * 4)
    assert f"one layer while it is loaded {human(layer)}, embedding {human(embedding)}" in text
    assert f"at most {hidden} of the whole corpus" in text
    least = human(MARGIN * model.headers.total_bytes)
    assert (f"by layer where less than {least} of the devices' memory is free" in text) == (stream == "auto")


def test_how_many_gpus_hold_a_stage():
    spread = Stage("a", "", spread=100 * 10**9, each=4 * 10**9, piece=2 * 10**9, counts=range(1, 9))
    assert [spread.fewest(size) for size in (24, 48, 80, 141, 192)] == [6, 3, 2, 1, 1]
    for size in (24, 48, 80):
        count = spread.fewest(size)
        assert spread.on_each(count) <= 0.95 * size * 10**9 < spread.on_each(count - 1)
    shared = Stage("b", "", spread=61 * 10**9, cache=8 * 10**9, heads=4, counts=(1, 2, 4, 8), share=0.9)
    assert [shared.fewest(size) for size in (8, 16, 24, 48, 80)] == [None, 8, 4, 2, 1]
    assert shared.on_each(8) == 61 * 10**9 / 8 + 2 * 10**9
    rows = gpus_needed([spread, Stage("host", "", each=1), shared, Stage("none", "", spread=10**13, counts=(1, 2))])
    assert [row[0] for row in rows] == ["GPUs needed", "a", "b", "none"] and rows[-1][1:] == ("-",) * 5
    assert rows[1][1:] == ("6", "3", "2", "1", "1")


def test_the_disk_that_checkpoints_need(folders, corpus, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    given = local(folders["olmoe"], corpus, out, "ratio=0.25")
    with initialize_config_module("conf", version_base="1.3"):
        one = checkpoint_bytes(compose("config", overrides=[*given, "method=reap"]))
        assert checkpoint_bytes(compose("config", overrides=[*given, "method=none", "ratio=0"])) == 0
        assert checkpoint_bytes(compose("config", overrides=[*given, "method=reap", "ratio=0.99"])) == 0
    sweep = local(folders["olmoe"], corpus, out, "method=reap", "ratio=0.25,0.5", "dry_run=true")
    assert winnow(monkeypatch, "-m", *sweep) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("disk: ")]
    with initialize_config_module("conf", version_base="1.3"):
        other = checkpoint_bytes(compose("config", overrides=[*given[:-1], "method=reap", "ratio=0.5"]))
    assert line.startswith(f"disk: {human(one + other)} for the checkpoints of all cells")
    assert winnow(monkeypatch, *local(folders["olmoe"], corpus, out, "method=reap", "ratio=0.25", "dry_run=true")) == 0
    assert f"disk: {human(one)} for this cell's checkpoint" in capfd.readouterr().out
    assert winnow(monkeypatch, *local(folders["olmoe"], corpus, out, "method=reap", "ratio=0.25")) == 0
    assert one == sum(nbytes for _, nbytes in stored(out / "checkpoint").values())


def hub_node(folder: Path, **more: object) -> dict[str, object]:
    return {"name": "n", "path": "somebody/a-model", **more}


def test_a_hub_model_needs_config_json_alone(folders, monkeypatch, no_weights):
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(folders["olmoe"] / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model, source = anatomy(hub_node(folders["olmoe"], architecture={"model_type": "mixtral"}))
    assert asked == [("somebody/a-model", "config.json")]
    assert of_headers(model.headers) == stored(folders["olmoe"]) and source == "from config.json on the hub"


def test_without_the_hub_the_model_config_has_to_say_it(folders, monkeypatch, no_weights):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WinnowError, match="hub is out of reach.*hf download somebody/a-model"):
        anatomy(hub_node(folders["olmoe"]))
    known = read_config(folders["olmoe"])
    model, source = anatomy(hub_node(folders["olmoe"], architecture=known))
    assert of_headers(model.headers) == stored(folders["olmoe"]) and "out of reach" in source


def test_what_is_quantised_or_incomplete_is_refused(folders, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = read_config(folders["olmoe"])
    for broken, message in (
        (config | {"quantization_config": {"quant_method": "fp8"}}, r"'somebody/a-model': .*quantised \(fp8\).*bf16"),
        (config | {"hidden_size": "wide"}, "does not describe a complete olmoe model"),
        (config | {"model_type": "llama"}, "'llama' is not supported"),
    ):
        with pytest.raises(WinnowError, match=message):
            anatomy(hub_node(folders["olmoe"], architecture=broken))


def test_a_compressed_checkpoint_is_not_compressed_again(folders, tmp_path):
    apply_plan(folders["olmoe"], PLANS["merged"][0], tmp_path / "out")
    model = anatomy_of_folder(tmp_path / "out", read_config(tmp_path / "out"))
    with pytest.raises(WinnowError, match="compressed already"):
        outcome(method_named("reap"), Fraction(1, 4), model)
