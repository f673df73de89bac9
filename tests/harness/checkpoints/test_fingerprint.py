"""The fingerprint of a model follows its content: config and weights, and nothing else."""

import pytest

from harness.checkpoints import fingerprint
from harness.checkpoints.fingerprint import model_fingerprint
from harness.errors import WinnowError


def checkpoint(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "model-2.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.mark.parametrize("full_up_to", [2**30, 0])
def test_model_fingerprint_follows_config_and_weights(tmp_path, monkeypatch, full_up_to):
    monkeypatch.setattr(fingerprint, "_FULL_HASH_BYTES", full_up_to)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 100)
    folder = checkpoint(tmp_path / "model")
    first = model_fingerprint(folder)
    assert first.startswith("sha256:" if full_up_to else "sha256-sampled:")
    assert first == model_fingerprint(checkpoint(tmp_path / "copy"))
    (folder / "config.json").write_text("{ }")
    assert model_fingerprint(folder) != first
    (folder / "config.json").write_text("{}")
    for position in (0, -1):  # the header, and the last byte
        content = bytearray((folder / "model-1.safetensors").read_bytes())
        content[position] ^= 1
        (folder / "model-1.safetensors").write_bytes(bytes(content))
        assert model_fingerprint(folder) != first
        content[position] ^= 1
        (folder / "model-1.safetensors").write_bytes(bytes(content))
    assert model_fingerprint(folder) == first


def test_the_full_fingerprint_sees_every_byte(tmp_path):
    folder = checkpoint(tmp_path / "model")
    first = model_fingerprint(folder)
    content = bytearray((folder / "model-1.safetensors").read_bytes())
    content[9999] ^= 1
    (folder / "model-1.safetensors").write_bytes(bytes(content))
    assert model_fingerprint(folder) != first


def test_model_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WinnowError, match="needs config.json and weights"):
        model_fingerprint(tmp_path)
