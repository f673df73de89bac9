"""What is wrong with a model's folder is said in one line, before weights are read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.backends.hf import HFBackend
from harness.checkpoints.check import check_checkpoint, check_names
from harness.checkpoints.config import config_integer, read_config, read_generation_config
from harness.checkpoints.load import check_device, load_model
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.tokenizer import load_tokenizer
from harness.errors import WinnowError
from harness.families.table import family_of
from tests.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "olmoe")
    return tmp_path / "model"


def changed(folder: Path, **values: Any) -> dict[str, Any]:
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "no JSON object, but a list"),
        (b"null", "no JSON object, but null"),
        (b"3", "no JSON object, but a number"),
        (b'"x"', "no JSON object, but a text"),
        (b"true", "no JSON object, but true or false"),
        (b"", "not valid JSON"),
        (b'{"a', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": "\xff"}', "not in UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_none(content: bytes, says: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    read = read_config if name == "config.json" else read_generation_config
    with pytest.raises(WinnowError, match=says) as told:
        read(tmp_path)
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_config(tmp_path) == {"a": 1} and read_generation_config(tmp_path) == {}


@pytest.mark.parametrize("value", [0, -1, True, "2", 2.0, None, [], [2, 0], [2, 3], {}])
def test_numbers_are_whole_and_positive(value: Any) -> None:
    with pytest.raises(WinnowError, match="num_experts_per_tok"):
        family_of({"model_type": "olmoe"}).top_k({"num_experts_per_tok": value})
    with pytest.raises(WinnowError, match="hidden_size"):
        config_integer({"hidden_size": value}, "hidden_size")
    assert family_of({"model_type": "olmoe"}).top_k({"num_experts_per_tok": [2, 2]}) == 2


@pytest.mark.parametrize("value", [None, ["olmoe"], 3, "llama"])
def test_an_architecture_that_is_none(value: Any) -> None:
    with pytest.raises(WinnowError, match="is not supported; supported: .*olmoe"):
        family_of({"model_type": value})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_act": "softserve"}, "unknown activation hidden_act='softserve'"),
        ({"rope_parameters": {"rope_type": "lasso"}}, "unknown rope type 'lasso' in rope_parameters; known: .*yarn"),
        ({"rope_scaling": {"type": "lasso"}}, "unknown rope type 'lasso' in rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "lasso"}}}, "unknown rope type 'lasso'"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
    ],
)
def test_names_that_transformers_does_not_know(values: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(WinnowError, match=says):
        check_names(folder, changed(folder, **values))
    with pytest.raises(WinnowError, match=says):
        load_model(folder)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_known_rope_types(kind: str) -> None:
    check_names(Path(), {"rope_parameters": {"rope_type": kind}, "rope_scaling": {"type": kind}, "hidden_act": "silu"})


@pytest.mark.parametrize("rows", [100, 299, 301])
def test_a_vocabulary_of_another_size(rows: int, folder: Path) -> None:
    config = changed(folder, vocab_size=rows)
    with pytest.raises(WinnowError, match=rf"vocab_size={rows}, but .* has 300 rows: set vocab_size to 300"):
        check_checkpoint(folder, family_of(config), config)


def test_a_tokenizer_of_a_larger_model(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.resize_token_embeddings(200)
    with pytest.raises(WinnowError, match="outside the model's vocabulary of 200"):
        HFBackend(model, tokenizer).loglikelihood([("a", "😀")])


def test_what_transformers_trips_over_names_config_json(folder: Path) -> None:
    changed(folder, num_attention_heads=0)
    with pytest.raises(WinnowError, match=r"config.json \(ZeroDivisionError"):
        load_model(folder)


@pytest.mark.parametrize("name", ["unreadable", "a folder"])
def test_weights_that_cannot_be_read_are_not_called_truncated(name: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.unlink()
    if name == "a folder":
        weights.mkdir()
    else:
        weights.symlink_to(weights)
    with pytest.raises(WinnowError) as told:
        CheckpointReader(folder)
    assert "model.safetensors" in str(told.value) and "truncated" not in str(told.value)


def test_weights_that_may_not_be_read(folder: Path) -> None:
    """By another user than the superuser, who may read all."""
    weights = folder / "model.safetensors"
    weights.chmod(0)
    program = (
        "import os, sys; from pathlib import Path; from harness.checkpoints.reader import CheckpointReader\n"
        "os.chdir(sys.argv[1])\n"  # so that no folder above counts
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: CheckpointReader(Path())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    folder.chmod(0o755)
    found = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
    assert found.stdout.strip() == "WinnowError model.safetensors cannot be read: Permission denied", found.stderr


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, {"": "cuda:1"}])
def test_a_device_that_is_not_there(device: Any) -> None:
    if torch.cuda.device_count():
        pytest.skip("there is a GPU")
    with pytest.raises(WinnowError, match="take cpu"):
        check_device(device)


def test_devices_that_are_there() -> None:
    for device in ("cpu", "auto", {"": "cpu"}):
        check_device(device)
