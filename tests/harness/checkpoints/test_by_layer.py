"""One decoder layer at a time: what is read, what is there, and what is refused."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.checkpoints import reader as reading
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.load import load_model
from harness.checkpoints.reader import CheckpointReader
from harness.errors import WinnowError
from tests.tiny import tiny_model

MASK = torch.ones(2, 20, dtype=torch.long)
INPUTS = {"input_ids": torch.arange(40).reshape(2, 20), "attention_mask": MASK}


def logits(model: ModelByLayer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = None
    with torch.inference_mode():
        for layer in model.layers(range(model.depth)):
            hidden = model.run(layer, hidden, inputs)
        with model.head():
            return model.logits(hidden, inputs)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("qwen3_moe", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
        ("olmoe", {"rope_type": "linear", "factor": 2.0}),
        ("phimoe", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                    "short_mscale": 1.1, "long_mscale": 1.2, "original_max_position_embeddings": 16}),
        ("deepseek_v3", {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
                         "original_max_position_embeddings": 512}),
    ],
)  # fmt: skip
def test_positions_of_every_kind(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    model.config.rope_parameters = {**model.config.rope_parameters, **rope}
    model.save_pretrained(tmp_path)
    whole = load_model(tmp_path)
    with torch.inference_mode():
        assert torch.equal(logits(ModelByLayer(tmp_path), INPUTS), whole(**INPUTS).logits)
    tiny_model(family).save_pretrained(tmp_path / "other")
    assert not torch.equal(logits(ModelByLayer(tmp_path / "other"), INPUTS), whole(**INPUTS).logits)


def test_layers_that_the_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    """Those for multi-token prediction, behind the last."""
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    want = logits(ModelByLayer(tmp_path), INPUTS)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {name.replace(".2.", ".61."): value.clone() for name, value in tensors.items() if ".layers.2." in name}
    save_file(tensors | more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(ModelByLayer(tmp_path), INPUTS), want)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_tensor_that_is_missing_is_found_before_anything_is_read(name: str, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WinnowError, match=f"does not fit its config.json: 1 missing_keys, such as {name}"):
        ModelByLayer(tmp_path)


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(16, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WinnowError, match="1 mismatched_keys"):
        ModelByLayer(tmp_path)


def test_one_layer_is_there_and_then_it_is_not(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    model, whole = ModelByLayer(tmp_path), load_model(tmp_path)
    held = model.other_bytes()
    for layer in model.layers([2, 0]):
        found = dict(model.skeleton.model.layers[layer].state_dict())
        for name, value in whole.model.layers[layer].state_dict().items():
            assert torch.equal(found[name], value) and value.dtype == found[name].dtype, name
        assert model.other_bytes() - held == sum(value.nbytes for value in found.values()) <= model.layer_bytes()
        assert not model._reader._handles, "pages of the files are no longer mapped"
    assert model.other_bytes() == held and model.layers([]) is not None and list(model.layers([])) == []


def test_the_next_layer_is_read_ahead_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="40KB")
    reader = CheckpointReader(tmp_path)
    names = [name for name in reader.names() if ".layers.1." in name]
    assert len({reader.file_of(name) for name in names}) > 1
    monkeypatch.setattr(reading, "_AHEAD", 700)
    seen: dict[str, bytes] = {}

    def preadv(number: int, buffers: list[memoryview], place: int) -> int:
        path = Path(f"/proc/self/fd/{number}").readlink()
        count = real(number, buffers, place)
        seen[path.name] = seen.get(path.name, b"") + bytes(buffers[0][:count])
        return count

    real = reading.os.preadv
    monkeypatch.setattr(reading.os, "preadv", preadv)
    reader.read_ahead(names, threading.Event())
    read = b"".join(seen.values())
    assert len(read) == sum(reader.nbytes(name) for name in names)
    for path in reader.files:
        with safe_open(path, framework="pt") as file:
            for name in set(names) & set(file.keys()):
                assert file.get_tensor(name).numpy().tobytes() in seen[path.name]
    seen.clear()
    stopped = threading.Event()
    stopped.set()
    reader.read_ahead(names, stopped)
    assert not seen
